"""Architectures by name."""

import importlib
from collections.abc import Callable

from flax import nnx

from genrec_jax.errors import UserError
from genrec_jax.models.base import Build, ModelConfig, Ranker, Retriever
from genrec_jax.models.mup import parametrise

Model = Ranker | Retriever
Builder = Callable[..., Model]  # (config, build, *, rngs)
_MODELS: dict[str, tuple[type[ModelConfig], Builder]] = {}


def register(config: type[ModelConfig]) -> Callable[[type], type]:
    """Class decorator: the model built from ``config``, known by ``config.name``."""

    def add(model: type) -> type:
        _MODELS[config.name] = (config, model)
        return model

    return add


def names() -> list[str]:
    _import_all()
    return sorted(_MODELS)


def config_type(name: str) -> type[ModelConfig]:
    """The configuration class of an architecture. Raises UserError for an unknown name."""
    _import_all()
    if name not in _MODELS:
        raise UserError(f"unknown model {name!r}; known models: {', '.join(names())}")
    return _MODELS[name][0]


def build(config: ModelConfig, build: Build, *, rngs: nnx.Rngs) -> Model:
    """Builds the architecture that ``config`` describes for a dataset's schema and row shape."""
    _import_all()
    make = _MODELS[config.name][1]
    model, base = make(config, build, rngs=rngs), config.base
    if base is not None:
        parametrise(model, nnx.eval_shape(lambda: make(base, build, rngs=nnx.Rngs(0))), branch=config.branch)
    return model


def _import_all() -> None:
    for module in ("dcn", "din", "dirl", "dlrm", "hstu", "hstu_retrieval", "sasrec", "transformer"):
        importlib.import_module(f"genrec_jax.models.{module}")
