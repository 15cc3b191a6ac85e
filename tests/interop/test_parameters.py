"""Parameters out to the public code's names and in again: the same bits, or one sentence that says what is wrong."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from genrec_jax import interop
from genrec_jax.batch import Shape
from genrec_jax.errors import UserError
from genrec_jax.models.dirl import DirLConfig
from genrec_jax.models.hstu_retrieval import HSTURetrievalConfig
from genrec_jax.models.sasrec import SASRecConfig
from genrec_jax.nn.stu import stu_stack
from tests.interop.torch_writer import Saved
from tests.models.gr_helpers import initialised

MODELS = ("hstu_retrieval", "sasrec", "stu", "stu with group norm")


@functools.cache
def model(kind):
    """Parameters of 3 layers, all different, none symmetric or square where the public code's is not."""
    sizes = {"width": 8, "depth": 3, "heads": 2, "negatives": 4}
    if kind == "hstu_retrieval":
        return initialised(HSTURetrievalConfig(**sizes, qk_width=3, v_width=5), Shape(6, 1))
    if kind == "sasrec":
        return initialised(SASRecConfig(**sizes), Shape(6, 1))
    options = {"qk_width": 3, "v_width": 5, "longest": 9, "group_norm": kind != "stu"}
    return stu_stack(8, 3, 2, **options, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def values(kind):
    """Arrays by the public code's names with distinct numbers everywhere."""
    rng = np.random.default_rng(1)
    return {n: rng.normal(size=x.shape).astype(np.float32) for n, x in interop.to_reference(model(kind)).items()}


def flat(state):
    return {path: np.asarray(p[...]) for path, p in nnx.to_flat_state(state)}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_is_exact(kind, suffix, tmp_path):
    """In, out to a file, in from the file, out: every bit as given; and every parameter of the model has a name."""
    given = values(kind)
    here = nnx.clone(model(kind))
    state = interop.from_reference(here, given, "here")
    assert flat(state).keys() == flat(nnx.state(here, nnx.Param)).keys()
    nnx.update(here, state)
    file = tmp_path / f"weights{suffix}"
    interop.save(here, file)
    there = nnx.clone(model(kind))
    interop.load(there, file)
    for path, array in flat(nnx.state(there, nnx.Param)).items():
        assert array.tobytes() == flat(state)[path].tobytes(), path
    again = interop.to_reference(there)
    assert again.keys() == given.keys()
    for name, array in given.items():
        assert again[name].shape == array.shape
        assert np.ascontiguousarray(again[name]).tobytes() == array.tobytes(), name
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_checkpoint_of_pytorch(kind, tmp_path):
    """With the names of a parallel run, the mask that the retrieval models save, and half precision widened exactly."""
    given = {name: x.astype(ml_dtypes.bfloat16) if x.ndim == 1 else x for name, x in values(kind).items()}
    saved, extra = Saved(), {} if kind.startswith("stu") else {"_attn_mask": np.triu(np.ones((17, 17), bool), 1)}
    tensors = {f"module.{name}": saved.tensor(x) for name, x in (given | extra).items()}
    file = saved.write(tmp_path / "checkpoint.pt", {"epoch": 9, "model_state_dict": saved.ordered(tensors)})
    here = nnx.clone(model(kind))
    interop.load(here, file)
    for name, array in interop.to_reference(here).items():
        np.testing.assert_array_equal(array, given[name].astype(np.float32))


def test_layouts_are_those_of_pytorch():
    """One asymmetric entry of each kind of matrix: torch's linear maps and convolutions hold outputs first."""
    out = interop.to_reference(model("sasrec"))
    p = flat(nnx.state(model("sasrec"), nnx.Param))
    assert out["attention_layers.1.in_proj_weight"].shape == (24, 8)
    assert out["attention_layers.1.in_proj_weight"][20, 3] == p["stack", "blocks", 1, "project", "kernel"][3, 20]
    assert out["forward_layers.2._conv1d.3.weight"].shape == (8, 8, 1)
    assert out["forward_layers.2._conv1d.3.weight"][5, 3, 0] == p["stack", "blocks", 2, "outer", "kernel"][3, 5]
    hstu = interop.to_reference(model("hstu_retrieval"))
    assert hstu["_hstu._attention_layers.0._uvqk"].shape == (8, 32)
    assert hstu["_hstu._attention_layers.0._o.weight"].shape == (8, 10)


@pytest.mark.parametrize("kind", MODELS)
def test_what_does_not_fit_is_named(kind):
    given = values(kind)
    name = next(n for n, x in given.items() if x.ndim == 2)
    rows, columns = given[name].shape

    def said(arrays):
        with pytest.raises(UserError) as error:
            interop.from_reference(model(kind), arrays, "weights.npz")
        return str(error.value)

    others = {n: x for n, x in given.items() if n != name}
    assert said(others) == f"weights.npz lacks {name}"
    assert said(given | {"_extra": given[name], "b": given[name]}) == (
        "weights.npz holds what the model has not: _extra, b"
    )
    assert said(given | {name: given[name].T[:, :-1]}) == (
        f"weights.npz: {name} has shape [{columns}, {rows - 1}], the model needs [{rows}, {columns}]"
    )
    for dtype in (np.float64, np.int64):
        assert said(given | {name: given[name].astype(dtype)}) == (
            f"weights.npz: {name} holds {np.dtype(dtype)}, which float32 cannot hold exactly"
        )
    assert said({}).endswith(f" and {len(given) - 5} more")


def test_models_that_the_public_code_has_not():
    with pytest.raises(UserError, match="the public code has no parameters for DirL: it has hstu_retrieval, sasrec"):
        interop.to_reference(initialised(DirLConfig(width=8, heads=2), Shape(6, 1)))


def test_files_of_no_known_kind(tmp_path):
    with pytest.raises(
        UserError, match=r"a.bin is of no kind that can be read; there is: .npz, .safetensors, .pt, .pt"
    ):
        interop.read_tensors(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a.pt is of no kind that can be written; there is: .npz, .safetensors"):
        interop.write_tensors(tmp_path / "a.pt", {})
    for kind in ("npz", "safetensors"):
        file = tmp_path / f"a.{kind}"
        file.write_bytes(b"neither the one nor the other")
        with pytest.raises(UserError, match=f"a.{kind} is not a readable {kind} file"):
            interop.read_tensors(file)
        with pytest.raises(FileNotFoundError) as error:
            interop.read_tensors(tmp_path / f"absent.{kind}")
        assert error.value.filename == str(tmp_path / f"absent.{kind}")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_failed_write_leaves_nothing(suffix, tmp_path):
    with pytest.raises(FileNotFoundError):
        interop.write_tensors(tmp_path / "absent" / f"a{suffix}", {"a": np.ones(2, np.float32)})
    assert not list(tmp_path.iterdir())


def test_strided_arrays_are_written_as_they_read(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for suffix in (".npz", ".safetensors"):
        interop.write_tensors(tmp_path / f"a{suffix}", {"a": array, "scalar": np.array(1.5, np.float32)})
        got = interop.read_tensors(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(got["a"], array)
        assert got["scalar"].shape == ()
