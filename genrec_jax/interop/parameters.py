"""Which of our parameters is which of the public code's, and how each lies there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from genrec_jax.errors import UserError
from genrec_jax.interop.files import read_tensors, write_tensors
from genrec_jax.models.hstu_retrieval import HSTURetrieval
from genrec_jax.models.sasrec import SASRec
from genrec_jax.nn.embedding import by_id, from_ids
from genrec_jax.nn.hstu import HSTUBlock
from genrec_jax.nn.stack import Stack

Place = tuple[Any, ...]  # of a parameter in a model


class Layout(NamedTuple):
    """How an array of ours lies in the public code, and back. ``ours`` need not know the array's shape."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(lambda x: x.T, lambda x: x.T)  # torch.nn.Linear: [outputs, inputs]
CONVOLUTION = Layout(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])  # torch.nn.Conv1d of one place

_BUFFERS = ("_attn_mask",)  # saved beside the parameters of the retrieval models; the causal mask

_ITEMS: Place = ("items_table", "rows_table")
_RETRIEVAL: dict[str, tuple[Place, Layout]] = {
    "_embedding_module._item_emb.weight": (_ITEMS, SAME),
    "_input_features_preproc._pos_emb.weight": (("positions",), SAME),
}
# Names of one block, {} standing for its number.
_HSTU: dict[str, tuple[Place, Layout]] = {
    "_hstu._attention_layers.{}._uvqk": (("project", "kernel"), SAME),
    "_hstu._attention_layers.{}._rel_attn_bias._ts_w": (("bias", "time"), SAME),
    "_hstu._attention_layers.{}._rel_attn_bias._pos_w": (("bias", "position"), SAME),
    "_hstu._attention_layers.{}._o.weight": (("out", "kernel"), LINEAR),
    "_hstu._attention_layers.{}._o.bias": (("out", "bias"), SAME),
}
_SASREC: dict[str, tuple[Place, Layout]] = {
    "attention_layers.{}.in_proj_weight": (("project", "kernel"), LINEAR),
    "attention_layers.{}.in_proj_bias": (("project", "bias"), SAME),
    "attention_layers.{}.out_proj.weight": (("out", "kernel"), LINEAR),
    "attention_layers.{}.out_proj.bias": (("out", "bias"), SAME),
    "forward_layers.{}._conv1d.0.weight": (("inner", "kernel"), CONVOLUTION),
    "forward_layers.{}._conv1d.0.bias": (("inner", "bias"), SAME),
    "forward_layers.{}._conv1d.3.weight": (("outer", "kernel"), CONVOLUTION),
    "forward_layers.{}._conv1d.3.bias": (("outer", "bias"), SAME),
}
_RANKING: dict[str, tuple[Place, Layout]] = {
    "_stu_layers.{}._uvqk_weight": (("project", "kernel"), SAME),
    "_stu_layers.{}._uvqk_beta": (("project", "bias"), SAME),
    "_stu_layers.{}._input_norm_weight": (("norm", "scale"), SAME),
    "_stu_layers.{}._input_norm_bias": (("norm", "bias"), SAME),
    "_stu_layers.{}._output_weight": (("out", "kernel"), SAME),
    "_stu_layers.{}._output_norm_weight": (("out_norm", "scale"), SAME),
    "_stu_layers.{}._output_norm_bias": (("out_norm", "bias"), SAME),
}


def _names(model: nnx.Module) -> dict[str, tuple[Place, Layout]]:
    """The public code's names of a model's parameters, and where and how these lie here."""
    if isinstance(model, HSTURetrieval | SASRec):
        block = _HSTU if isinstance(model, HSTURetrieval) else _SASREC
        vocab = model.items_table.vocab
        items = Layout(from_ids, lambda table: by_id(table, vocab))
        own = {name: (path, items if path == _ITEMS else layout) for name, (path, layout) in _RETRIEVAL.items()}
        return own | _blocks(block, ("stack", "blocks"), len(model.stack.blocks))
    ranking = isinstance(model, Stack) and all(isinstance(b, HSTUBlock) and b.variant.affine for b in model.blocks)
    if isinstance(model, Stack) and ranking:
        return _blocks(_RANKING, ("blocks",), len(model.blocks))
    raise UserError(
        f"the public code has no parameters for {type(model).__name__}: it has hstu_retrieval, sasrec and stu_stack"
    )


def _blocks(block: dict[str, tuple[Place, Layout]], place: Place, depth: int) -> dict[str, tuple[Place, Layout]]:
    return {
        name.format(i): ((*place, i, *path), layout) for i in range(depth) for name, (path, layout) in block.items()
    }


def from_reference(model: nnx.Module, arrays: Mapping[str, np.ndarray], source: str) -> nnx.State:
    """The model's parameters, in float32, from arrays by the public code's names.

    ``model`` may be abstract (`nnx.eval_shape`); it is read for its shapes alone. ``source`` says in errors where the
    arrays are from.

    Raises:
      UserError: a name that lacks or that the model has not, a wrong shape, or a type that float32 cannot hold exactly;
        a model that the public code has not.
    """
    names = _names(model)
    missing = [name for name in names if name not in arrays]
    unknown = [name for name in arrays if name not in names and name not in _BUFFERS]
    if missing:
        raise UserError(f"{source} lacks {_listed(missing)}")
    if unknown:
        raise UserError(f"{source} holds what the model has not: {_listed(unknown)}")
    state = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    found = []
    for name, (path, layout) in names.items():
        array = arrays[name]
        if array.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise UserError(f"{source}: {name} holds {array.dtype}, which float32 cannot hold exactly")
        wanted = layout.theirs(np.broadcast_to(np.float32(0), state[path].shape)).shape
        if array.shape != wanted:
            raise UserError(f"{source}: {name} has shape {list(array.shape)}, the model needs {list(wanted)}")
        found.append((path, state[path].replace(jnp.asarray(layout.ours(array), jnp.float32))))
    return nnx.from_flat_state(found)


def to_reference(model: nnx.Module, state: nnx.State | None = None) -> dict[str, np.ndarray]:
    """The model's parameters, or a ``state`` of their structure (gradients), by the public code's names and layouts.

    Raises UserError for a model that the public code has not.
    """
    state = nnx.state(model, nnx.Param) if state is None else state
    flat = dict(nnx.to_flat_state(state))
    return {name: layout.theirs(np.asarray(flat[path][...])) for name, (path, layout) in _names(model).items()}


def load(model: nnx.Module, path: Path) -> None:
    """Sets the model's parameters from an npz, safetensors or .pt file. Errors as in `from_reference`."""
    nnx.update(model, from_reference(model, read_tensors(path), str(path)))


def save(model: nnx.Module, path: Path) -> None:
    """Writes the model's parameters to an npz or safetensors file.

    The retrieval models of PyTorch also expect their causal mask, which is no parameter:
    ``model.load_state_dict(tensors, strict=False)``.
    """
    write_tensors(path, to_reference(model))


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
