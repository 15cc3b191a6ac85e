"""The whole of a trial in one tree of frozen dataclasses that round-trips to JSON."""

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from genrec_jax.batch import Shape
from genrec_jax.data.stochastic_length import Subsequence
from genrec_jax.errors import UserError
from genrec_jax.models import registry
from genrec_jax.models.base import ModelConfig
from genrec_jax.models.sequence import SequenceConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which rows are cut from a dataset folder.

    path: folder made by ``genrec data import``. history: N, events a model may look back on. candidates: K per request.
    segments: how many short histories may share one row. split: of ranking, by global "time", or by "users", which asks
    nothing of the future; retrieval holds out each user's last events instead. validation, test: shares of the events,
    or of the users. protocol: of retrieval. "honest" trains on all but a user's
    last two events and watches the last but one; "original", the public HSTU code's, trains on all but the last and
    watches that, which is the test event. fraction: share of users whose events are trained on.
    packing: how several segments come into a row. "pass" packs all rows once; a batch is ``batch_rows`` packed rows.
    "batch" draws ``batch_rows`` rows and packs these, so that a batch is as many users however long they are.
    eval_impressions: evaluate on at most this many impressions, the same ones for every architecture.
    stochastic_length: alpha in (1, 2]; below 2, training thins histories that are longer than N^(alpha/2)
    (``data/stochastic_length.py``; give it segments to pack, or rows stay as long as they were). subsequence: how the
    events that stay are chosen. rows_per_user: how many of a user's n rows a pass takes, drawn anew for each (0: all),
    so that each of them is trained on at rate rows_per_user / n. Neither touches evaluation.
    workers: processes that build batches ahead of the step (0: threads). digest: of the dataset's content, filled in
    when a path is resolved; stands for the path in the trial's name.
    """

    path: str = ""
    history: int = 64
    candidates: int = 8
    segments: int = 1
    packing: Literal["pass", "batch"] = "pass"
    protocol: Literal["honest", "original"] = "honest"
    split: Literal["time", "users"] = "time"
    validation: float = 0.1
    test: float = 0.1
    fraction: float = 1.0
    eval_impressions: int = 32768
    stochastic_length: float = 2.0
    subsequence: Subsequence = "elapsed"
    rows_per_user: int = 0
    workers: int = 0
    digest: str = ""

    @property
    def shape(self) -> Shape:
        return Shape(self.history, self.candidates, self.segments)


EmbeddingOptimizer = Literal["adamw", "rowwise_adamw", "rowwise_adagrad"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a trial is trained: AdamW.

    batch_rows: rows per step. epochs: passes over the training rows (ignored if ``steps`` is set). steps: optimiser
    steps. warmup: share of the steps, linear. decay: of the learning rate after that: "cosine" to zero just after the
    trial's own last step, or "constant", none. embedding_learning_rate and embedding_weight_decay: of tables;
    embedding_optimizer: theirs, AdamW of every row in every step, or one by the row that moves only those a batch reads
    (:mod:`genrec_jax.train.rows`); embedding_precision: of the rows that such a rule keeps; they are read and moved in
    float32 and rounded to bfloat16 at random, so that small steps add up. clip: largest global gradient norm, 0 for no
    limit. precision: compute type; parameters and optimiser state stay float32. pieces: parts of a batch that a CPU
    works on one after another, so that they stay in its caches; empty ones are skipped. log_every: in steps.
    checkpoint_every: in steps, but no sooner than checkpoint_seconds after the last one: a small model's step is
    shorter than its checkpoint. validations: evaluations of the validation part, evenly spaced over the steps, the last
    one after the last step. select: whose parameters are tested, the "last", or those of the "best" validation (by NE
    or NDCG@10; the later of equals).
    report_test: evaluate the test part after that; while settings are being chosen it is best left unread.
    """

    batch_rows: int = 32
    epochs: float = 1.0
    steps: int = 0
    learning_rate: float = 1e-3
    embedding_learning_rate: float = 1e-3
    embedding_optimizer: EmbeddingOptimizer = "adamw"
    embedding_precision: Literal["float32", "bfloat16"] = "float32"
    warmup: float = 0.05
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.01
    embedding_weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    pieces: int = 1
    select: Literal["last", "best"] = "last"
    report_test: bool = True
    log_every: int = 50
    checkpoint_every: int = 100
    checkpoint_seconds: float = 20.0
    validations: int = 1


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: data, architecture, training, seed. Its name is the hash of this tree."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        record["model"] = {"name": self.model.name, **record["model"]}
        return record

    @property
    def hash(self) -> str:
        """Twelve hex digits of the resolved configuration; the data are known by their digest, wherever they lie."""
        record = self.to_json()
        del record["data"]["path"]
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def default_trial(model: str, **data: Any) -> Trial:
    """A trial of the named architecture with default values. Raises UserError for an unknown name."""
    return Trial(data=DataConfig(**data), model=registry.config_type(model)())


def trial_from_json(record: Mapping[str, Any]) -> Trial:
    """The inverse of :meth:`Trial.to_json`. Raises UserError for an unknown key or a value of the wrong type."""
    record = dict(record)
    model = dict(record.get("model", {}))
    if "name" not in model:
        raise UserError("configuration key model.name is missing")
    trial = default_trial(model.pop("name"))
    flat = {"seed": record.pop("seed", 0)}
    for section, values in {**record, "model": model}.items():
        if not isinstance(values, Mapping):
            raise UserError(f"unknown configuration key {section!r}")
        flat.update({f"{section}.{key}": value for key, value in values.items()})
    return override(trial, flat)


def override(trial: Trial, values: Mapping[str, Any]) -> Trial:
    """The trial with dotted keys replaced (``{"model.width": 64}``; strings are read as the field's type).

    Raises UserError naming the key if it is unknown or its value has the wrong type, and checks the result.
    """
    for key, value in values.items():
        trial = _set(trial, key.split("."), value, key)
    check(trial)
    return trial


def _set(node: Any, path: list[str], value: Any, key: str) -> Any:
    fields = {f.name for f in dataclasses.fields(node)}
    if path[0] not in fields:
        where = key.rpartition(".")[0]
        raise UserError(f"unknown configuration key {key!r}; {where or 'a trial'} has: {', '.join(sorted(fields))}")
    if len(path) > 1:
        child = getattr(node, path[0])
        if not dataclasses.is_dataclass(child):
            raise UserError(f"unknown configuration key {key!r}: {path[0]} has no parts")
        return dataclasses.replace(node, **{path[0]: _set(child, path[1:], value, key)})
    hint = typing.get_type_hints(type(node))[path[0]]
    if dataclasses.is_dataclass(hint):
        raise UserError(f"configuration key {key!r} is a section; set one of its parts")
    return dataclasses.replace(node, **{path[0]: _read(value, hint, key)})


def _read(value: Any, hint: Any, key: str) -> Any:
    """``value`` (typed, or the text of a flag) as the field's type."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"configuration key {key!r} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise UserError(f"configuration key {key!r} must be a list, not {value!r}")
        return tuple(_read(p, typing.get_args(hint)[0], key) for p in parts if p != "")
    if hint is bool:
        named = {"true": True, "false": False}.get(str(value).lower())
        if named is None:
            raise UserError(f"configuration key {key!r} must be true or false, not {value!r}")
        return named
    try:
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return hint(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"configuration key {key!r} must be of type {hint.__name__}, not {value!r}") from None


def check(trial: Trial) -> None:
    """Refuses impossible shapes and budgets with a UserError naming the key."""
    data, train = trial.data, trial.train
    _check_ranges(trial)
    positive = {
        "data.history": data.history,
        "data.candidates": data.candidates,
        "data.segments": data.segments,
        "data.eval_impressions": data.eval_impressions,
        "train.batch_rows": train.batch_rows,
        "train.learning_rate": train.learning_rate,
        "train.embedding_learning_rate": train.embedding_learning_rate,
        "train.pieces": train.pieces,
        "train.log_every": train.log_every,
        "train.checkpoint_every": train.checkpoint_every,
        "train.validations": train.validations,
    }
    positive |= {"train.epochs": train.epochs} if train.steps == 0 else {"train.steps": train.steps}
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"configuration key {key!r} must be positive, not {value}")
    if train.batch_rows % train.pieces:
        raise UserError(
            f"configuration key 'train.batch_rows' ({train.batch_rows}) must be a multiple of 'train.pieces' "
            f"({train.pieces})"
        )
    if train.embedding_optimizer != "adamw" and getattr(trial.model, "negatives", 1) == 0:
        raise UserError(
            f"configuration key 'train.embedding_optimizer' cannot be {train.embedding_optimizer!r} with "
            "model.negatives=0: the full softmax reads and moves every row"
        )
    if trial.model.item_rows < 0:
        raise UserError(f"configuration key 'model.item_rows' must not be negative, not {trial.model.item_rows}")
    if train.embedding_optimizer == "adamw" and train.embedding_precision != "float32":
        raise UserError(
            "configuration key 'train.embedding_precision' can be 'bfloat16' with a row-wise train.embedding_optimizer "
            "alone"
        )
    shares = {"data.fraction": data.fraction, "data.validation": data.validation, "data.test": data.test}
    for key, value in shares.items():
        if not 0 < value <= 1:
            raise UserError(f"configuration key {key!r} must be in (0, 1], not {value}")
    if data.validation + data.test >= 1:
        raise UserError("configuration keys 'data.validation' and 'data.test' leave no events to train on")
    for name in ("warmup", "beta1", "beta2"):
        if not 0 <= getattr(train, name) < 1:
            raise UserError(f"configuration key 'train.{name}' must be in [0, 1), not {getattr(train, name)}")
    for name in ("weight_decay", "embedding_weight_decay", "clip", "checkpoint_seconds"):
        if getattr(train, name) < 0:
            raise UserError(f"configuration key 'train.{name}' must not be negative, not {getattr(train, name)}")
    if min(data.workers, data.rows_per_user, trial.seed) < 0:
        raise UserError("configuration keys 'data.workers', 'data.rows_per_user' and 'seed' must not be negative")
    if not 1 < data.stochastic_length <= 2:
        raise UserError(f"configuration key 'data.stochastic_length' must be in (1, 2], not {data.stochastic_length}")
    if data.stochastic_length < 2 and not isinstance(trial.model, SequenceConfig):
        raise UserError(
            f"configuration key 'data.stochastic_length' is for sequence models: {trial.model.name} pays little for "
            "its history and reads it as counts, which a thinned one gets wrong"
        )
    if data.split == "users" and trial.model.goal == "retrieval":
        raise UserError("configuration key 'data.split' can be 'users' for ranking alone")
    if data.protocol == "original" and (trial.model.goal != "retrieval" or train.select != "last"):
        raise UserError(
            "configuration key 'data.protocol' can be 'original' for retrieval alone, and with train.select=last: it "
            "watches the test event, by which nothing may be chosen"
        )
    trial.model.check()


# Beyond these an array cannot be allocated or a counter overflows, far from the setting that is at fault.
_LARGEST: Mapping[str, float] = {
    "data.history": 2**20,
    "data.candidates": 2**16,
    "data.segments": 2**12,
    "data.workers": 2**10,
    "train.batch_rows": 2**20,
    "train.epochs": 1e6,
    "seed": 2**63 - 1,
}
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = 1e30  # well inside float32


def _check_ranges(trial: Trial) -> None:
    """Refuses numbers that are not finite, and those no trial can have."""
    values = {
        f"{part}.{f.name}": getattr(node, f.name) for part, node in _parts(trial) for f in dataclasses.fields(node)
    }
    for key, value in (values | {"seed": trial.seed}).items():
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise UserError(f"configuration key {key!r} must be finite, not {number}")
            largest = _LARGEST.get(key, _LARGEST_INT if isinstance(number, int) else _LARGEST_FLOAT)
            if number > largest:
                raise UserError(f"configuration key {key!r} must be at most {largest}, not {number}")


def _parts(trial: Trial) -> tuple[tuple[str, Any], ...]:
    return ("data", trial.data), ("train", trial.train), ("model", trial.model)
