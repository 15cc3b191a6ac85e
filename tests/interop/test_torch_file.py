"""PyTorch files: tensors come out as they went in, and nothing else comes out at all."""

import ml_dtypes
import numpy as np
import pytest

from genrec_jax.errors import UserError
from genrec_jax.interop import read_tensors
from tests.interop.torch_writer import Raw, Saved, call, code, name


def arrays():
    rng = np.random.default_rng(0)
    return {
        "weight": rng.normal(size=(3, 4)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "half": rng.normal(size=5).astype(np.float16),
        "brain": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "double": rng.normal(size=(2, 2, 2)),
        "count": np.array([1, 2**40]),
        "mask": np.array([[True, False]]),
    }


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_type_is_read_to_the_bit(order, tmp_path):
    saved, expected = Saved(order), arrays()
    got = read_tensors(saved.write(tmp_path / "a.pt", saved.ordered({n: saved.tensor(x) for n, x in expected.items()})))
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        assert got[key].dtype == want.dtype
        assert got[key].shape == want.shape
        assert got[key].tobytes() == want.tobytes()


def test_views_share_a_storage(tmp_path):
    """A transposed view, one that starts late, and a parameter of the whole."""
    saved, values = Saved(), np.arange(12, dtype=np.float32)
    key = saved.storage(values)
    entries = {
        "whole": call(
            name("torch._utils", "_rebuild_parameter"),
            saved.view(key, (3, 4), (4, 1)),
            True,
            call(name("collections", "OrderedDict")),
        ),
        "transposed": saved.view(key, (4, 3), (1, 4)),
        "late": saved.view(key, (2, 2), (4, 1), offset=6),
    }
    got = read_tensors(saved.write(tmp_path / "a.pt", saved.ordered(entries)))
    whole = values.reshape(3, 4)
    for key, want in {"whole": whole, "transposed": whole.T, "late": whole[1:, 2:]}.items():
        np.testing.assert_array_equal(got[key], want)
        got[key][...] = 0  # a copy: neither a view of the file nor of its neighbours


@pytest.mark.parametrize("part", ["model_state_dict", "state_dict"])
def test_the_state_dict_of_a_parallel_checkpoint(part, tmp_path):
    saved, want = Saved(), np.arange(3, dtype=np.float32)
    state = saved.ordered({"module.a": saved.tensor(want), "module.b.c": saved.tensor(want)})
    other = {"state": {0: {"step": 7, "exp_avg": saved.tensor(want)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9,)}]}
    got = read_tensors(saved.write(tmp_path / "a.pt", {"epoch": 3, part: state, "optimizer_state_dict": other}))
    assert got.keys() == {"a", "b.c"}
    np.testing.assert_array_equal(got["a"], want)


def refused(tmp_path, value, saved=None):
    path = (saved or Saved()).write(tmp_path / "bad.pt", value)
    with pytest.raises(UserError) as error:
        read_tensors(path)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(f"{path} ").removeprefix(f"{path}: ")


CALLS = {
    "posix.system": ("posix", "system", "touch ran"),
    "builtins.eval": ("builtins", "eval", "open('ran', 'w')"),
    "builtins.getattr": ("builtins", "getattr", "a", "upper"),
    "os.system": ("os", "system", "touch ran"),
    "torch.load": ("torch", "load", "x"),
    "torch._utils._rebuild_device_tensor_from_numpy": ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    "collections.namedtuple": ("collections", "namedtuple", "x", "y"),
    "genrec_jax.interop.torch_file._tensor": ("genrec_jax.interop.torch_file", "_tensor"),
}


@pytest.mark.parametrize("what", CALLS)
def test_code_is_refused_and_not_run(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, attribute, *arguments = CALLS[what]
    said = refused(tmp_path, {"a": call(name(module, attribute), *arguments)})
    assert said == f"names {what}; only tensors and containers are read"
    assert not (tmp_path / "ran").exists()


def test_what_is_allowed_cannot_be_changed(tmp_path):
    """BUILD sets attributes: on the rebuilding function there are none to set, and the next file is read as before."""
    function = name("torch._utils", "_rebuild_tensor_v2")
    for state in (code({"function": 1}), code((None, {"__defaults__": (1,)}))):
        assert refused(tmp_path, {"a": Raw(function + state + b"b")}).startswith("holds a damaged pickle")
    saved = Saved()
    assert read_tensors(saved.write(tmp_path / "a.pt", {"a": saved.tensor(np.ones(2, np.float32))}))["a"].sum() == 2


def test_tensors_stay_inside_their_storage(tmp_path):
    def view(*place, **options):
        saved = Saved()
        key = saved.storage(np.arange(6, dtype=np.float32))
        return refused(tmp_path, {"a": saved.view(key, *place, **options)}, saved)

    assert "reaches past its storage of 6" in view((2, 4), (4, 1))
    assert "reaches past its storage of 6" in view((2,), (1,), offset=5)
    assert "reaches past its storage of 6" in view((1000, 1000), (0, 0))
    assert "a tensor of shape (-1,)" in view((-1,), (1,))
    assert "a tensor of shape (2,)" in view((2,), (-1,), offset=3)
    assert "a tensor of shape (2,)" in view((2,), (1, 1))
    assert view((6,), (1,), count=7) == "storage 0 should hold 7 numbers of a FloatStorage, and does not"


def test_files_that_hold_no_state_dict(tmp_path):
    assert refused(tmp_path, [1, 2]) == "holds no state dict, but a list"
    assert refused(tmp_path, {"a": 1}) == "'a' is no tensor, but a int"
    saved = Saved()
    assert refused(tmp_path, {3: saved.tensor(np.ones(2, np.float32))}, saved) == "3 is no tensor, but a ndarray"
    assert refused(tmp_path, {"a": Raw(b"R")}).startswith("holds a damaged pickle")
    assert refused(tmp_path, Raw(code("elsewhere") + b"Q")).startswith("holds a damaged pickle: an unknown reference")
    missing = ("storage", name("torch", "FloatStorage"), "9", "cpu", 2)
    assert refused(tmp_path, Raw(code(missing) + b"Q")).startswith("storage 9 should hold 2 numbers")


def test_files_that_are_no_archives(tmp_path):
    saved = Saved()
    good = saved.write(tmp_path / "good.pt", {"a": saved.tensor(np.ones(2, np.float32))}).read_bytes()
    for content in (b"", b"\x80\x02}q\x00.", good[: len(good) // 2]):
        path = tmp_path / "bad.pt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not a zip archive of torch.save \(PyTorch 1.6 or later\)"):
            read_tensors(path)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent.pt")
