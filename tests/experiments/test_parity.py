"""``genrec parity`` on attention: passes on recorded vectors, fails on any changed number, says what a file lacks."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import main
from experiments.parity import command
from experiments.parity.case import GRADIENT, LOSS_STEP, OUTPUT, Case, wanted
from experiments.parity.command import check
from kernels_pallas.hstu_attention import BACKENDS, hstu_attention

RECORDED = sorted((Path(__file__).resolve().parents[3] / "shared" / "golden").glob("attention_*.npz"))
META = {"alpha": 0.4, "divisor": 9, "max_attn_len": 3, "contextual_seq_len": 2, "causal": True}


@pytest.fixture(autouse=True)
def backends_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two that need no interpreter; `test_recorded_files_pass` runs them all."""
    monkeypatch.setattr(command, "BACKENDS", ("reference", "xla"))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """What a golden file holds, by the reference in float64: three sequences, one of no tokens, and padding behind."""
    rng = np.random.default_rng(0)
    offsets, targets, total, heads, dqk, dv = np.array([0, 9, 9, 14]), np.array([2, 0, 1]), 16, 2, 4, 3
    with jax.enable_x64(True):
        q, k = (jnp.asarray(rng.normal(size=(total, heads, dqk)).astype(np.float32), jnp.float64) for _ in range(2))
        v, dout = (jnp.asarray(rng.normal(size=(total, heads, dv)).astype(np.float32), jnp.float64) for _ in range(2))

        def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return hstu_attention(
                q,
                k,
                v,
                jnp.asarray(offsets),
                max_len=META["divisor"],
                alpha=META["alpha"],
                num_targets=jnp.asarray(targets),
                window=META["max_attn_len"],
                context_len=META["contextual_seq_len"],
                implementation="reference",
            )

        out, pull = jax.vjp(call, q, k, v)
        named = dict(zip(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), (q, k, v, out, dout, *pull(dout))))
        real = {name: np.asarray(array, np.float32) for name, array in named.items()}
    return real | {"seq_offsets": offsets, "num_targets": targets, "meta": np.array(json.dumps(META))}


def write(folder: Path, arrays: dict[str, Any], name: str = "attention_small.npz") -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def run(*files: Path) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(["parity", *map(str, files)])
    return stop.value.code


def test_own_vectors_pass(arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(tmp_path, arrays), write(tmp_path, arrays, "renamed.npz")) == 0
    said = capsys.readouterr().out
    for backend in ("reference", "xla"):
        assert sum(backend in line and "passes" in line for line in said.splitlines()) == 3  # two files and the worst
    assert "FAILS" not in said


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv", "q", "k", "v", "dout", "num_targets"])
def test_one_changed_number_fails(
    name: str, arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The changed one is named; a changed input shows in what depends on it."""
    changed = arrays[name].copy()
    place = (0,) if name == "num_targets" else (3, 1, 2)
    changed[place] = 1 if name == "num_targets" else changed[place] + np.float32(1e-2)
    assert run(write(tmp_path, arrays, "attention_good.npz"), write(tmp_path, arrays | {name: changed})) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("attention_small.npz" in line and "FAILS" in line for line in lines) == 2
    assert not any("attention_good.npz" in line and "FAILS" in line for line in lines)
    shown = name if name in ("out", "dq", "dk", "dv") else "dq" if name == "dout" else "out"
    for backend in ("reference", "xla"):
        assert any(line.startswith(f"attention_small.npz: {shown} of {backend} is off by") for line in lines)


def test_nan_fails(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = arrays["out"].copy()
    out[0, 0, 0] = np.nan
    assert run(write(tmp_path, arrays | {"out": out})) == 1


def test_a_backend_that_cannot_run_is_reported(
    arrays: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "elsewhere", "module_that_is_not_installed")
    monkeypatch.setattr(command, "BACKENDS", ("reference", "elsewhere"))
    assert run(write(tmp_path, arrays)) == 0
    said = capsys.readouterr().out
    assert "elsewhere  " in said
    assert "cannot run" in said
    assert "elsewhere did not run on every file: No module named 'module_that_is_not_installed'" in said


def test_each_rule_measures_in_its_own_way() -> None:
    """Absolute for outputs; over the largest entry for gradients; over the number itself for losses."""

    def bad(output: float, gradient: float, loss: float) -> list[str]:
        got = {"a": np.array([output]), "b": np.array([gradient, 0]), "c": np.array([loss, 8])}
        outputs = wanted({"a": np.zeros(1)}, OUTPUT) | wanted({"c": np.array([2.0, 8.0])}, LOSS_STEP)
        case = Case(lambda backend: got, outputs, wanted({"b": np.array([1.0, 50.0 - 50])}, GRADIENT))
        return [error.name for error in check(Path("x"), case, "reference").bad]

    assert bad(1.9e-5, 1 + 0.99e-4, 2 + 1.9e-4) == []
    assert bad(2.1e-5, 1, 2) == ["a"]
    assert bad(0, 1 + 1.01e-4, 2) == ["b"]
    assert bad(0, 1, 2 + 2.1e-4) == ["c"]
    assert bad(np.nan, np.nan, np.nan) == ["a", "c", "b"]


@pytest.mark.skipif(not RECORDED, reason="the recorded vectors are absent")
def test_recorded_files_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "BACKENDS", BACKENDS)
    assert run(*RECORDED) == 0
    lines = capsys.readouterr().out.splitlines()
    for backend in BACKENDS:
        rows = [line for line in lines if f" {backend} " in line and (line.strip().startswith(("attention_", "worst")))]
        assert len(rows) == len(RECORDED) + 1
        assert all("passes" in row or "cannot run" in row for row in rows)


def bad(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Files that cannot be used, by what the message must hold."""
    without = {name: array for name, array in arrays.items() if name not in ("dq", "dv")}
    meta = {name: value for name, value in META.items() if name != "alpha"}
    return {
        "lacks dq, dv": without,
        "meta is not JSON": arrays | {"meta": np.array("{alpha")},
        "meta is not a JSON object": arrays | {"meta": np.array("3")},
        "meta lacks alpha": arrays | {"meta": np.array(json.dumps(meta))},
        "meta's alpha must be a number": arrays | {"meta": np.array(json.dumps(META | {"alpha": "much"}))},
        "meta's max_attn_len must be a length": arrays | {"meta": np.array(json.dumps(META | {"max_attn_len": -1}))},
        "divisor must be positive": arrays | {"meta": np.array(json.dumps(META | {"divisor": 0}))},
        "causal is false": arrays | {"meta": np.array(json.dumps(META | {"causal": False}))},
        "k has shape": arrays | {"k": arrays["k"][:-1]},
        "out must hold numbers": arrays | {"out": np.array(["a"])},
        "seq_offsets must rise": arrays | {"seq_offsets": np.array([0, 9, 8, 14])},
        "seq_offsets must be a vector": arrays | {"seq_offsets": np.array([0.0, 9.0])},
        "num_targets must hold a count": arrays | {"num_targets": np.array([1])},
        "q and v must be [T, H, D]": arrays | {"q": arrays["q"][0]},
    }


def test_bad_contents_are_one_sentence(
    arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, contents in bad(arrays).items():
        file = write(tmp_path, contents)
        assert run(file) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {file}")
        assert words in said
        assert said.count("\n") == 1


def test_bad_files_are_one_sentence(
    arrays: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path, arrays).read_bytes()
    np.save(tmp_path / "attention_bare.npy", arrays["q"])
    bare = (tmp_path / "attention_bare.npy").read_bytes()
    middle = len(good) // 2
    contents = {
        "text": b"no archive",
        "empty": b"",
        "cut": good[:middle],
        "flipped": good[:middle] + bytes(255 - b for b in good[middle : middle + 8]) + good[middle + 8 :],
        "bare": bare,
    }
    for name, data in contents.items():
        file = tmp_path / f"attention_{name}.npz"
        file.write_bytes(data)
        assert run(file) == 2
        assert capsys.readouterr().err == f"error: {file} is not a readable npz file\n"
    assert run(tmp_path / "attention_absent.npz") == 2
    assert "No such file" in capsys.readouterr().err
    unknown = write(tmp_path, {"x": arrays["q"]}, "unknown.npz")
    assert run(unknown) == 2
    known = "attention, retrieval, ranking, trajectory"
    assert capsys.readouterr().err == f"error: {unknown} is no golden file of a known kind; there is: {known}\n"
    assert run() == 2
    assert "name at least one golden file" in capsys.readouterr().err
