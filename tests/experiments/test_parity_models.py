"""``genrec parity`` on models and training: recorded files pass, one changed number anywhere in them does not."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from experiments.parity.case import Arrays, Case
from experiments.parity.command import check, read_case
from genrec_jax.errors import UserError

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
FILES = sorted(file for kind in ("retrieval", "ranking", "trajectory") for file in GOLDEN.glob(f"{kind}_*.npz"))
BY_NAME = {file.stem: file for file in FILES}
pytestmark = pytest.mark.skipif(not FILES, reason="the recorded vectors are absent")
each_file = pytest.mark.parametrize("name", BY_NAME)


def recorded(name: str) -> dict[str, Any]:
    with np.load(BY_NAME[name]) as data:
        return dict(data)


@functools.cache
def computed(name: str) -> Arrays:
    """What is computed here from the file's inputs and parameters; it does not depend on what the file expects."""
    return read_case(BY_NAME[name]).run("model")


def changed(array: np.ndarray, by: float) -> np.ndarray:
    """One number in the middle moved, relative to the largest."""
    out = np.array(array)
    out.reshape(-1)[out.size // 2] += by * np.abs(array).max()
    return out


def case_of(folder: Path, name: str, arrays: dict[str, Any]) -> Case:
    file = folder / f"{name}.npz"
    np.savez(file, **arrays)
    return read_case(file)


@each_file
def test_recorded_files_pass(name: str) -> None:
    case = dataclasses.replace(read_case(BY_NAME[name]), run=lambda backend: computed(name))
    found = check(BY_NAME[name], case, "model")
    assert len(found.outputs) + len(found.gradients) == len(computed(name))
    assert not found.bad


@each_file
def test_one_changed_number_fails_by_its_name(name: str, tmp_path: Path) -> None:
    """In every output, every gradient, every trained parameter."""
    arrays = recorded(name)
    groups = ("out", "grad/", "final/", "dx")
    expected = [field for field in arrays if field.startswith(groups)]
    assert len(expected) == len(computed(name))
    for field in expected:
        case = case_of(tmp_path, name, arrays | {field: changed(arrays[field], 2e-3)})
        bad = check(tmp_path, dataclasses.replace(case, run=lambda backend: computed(name)), "model").bad
        assert [error.name for error in bad] == [field.removeprefix("grad/").removeprefix("final/")]


# (The choice of one negative may not show: most have next to no weight at a temperature of 0.05.)
INPUTS = {
    "retrieval_hstu_base": "in/ids",
    "retrieval_sasrec": "param/forward_layers.0._conv1d.0.weight",
    "ranking_stu_context": "x",
    "trajectory_hstu": "param/_hstu._attention_layers.0._rel_attn_bias._ts_w",
}


@pytest.mark.parametrize(("name", "field"), INPUTS.items())
def test_a_changed_input_shows_in_what_depends_on_it(
    name: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = recorded(name)
    array = np.array(arrays[field])
    first = array.reshape(-1)[:1]  # of the first user's first position, which every later one sees
    first[:] = first % 50 + 1 if field.startswith("in/") else first + 0.05
    file = tmp_path / f"{name}_changed.npz"
    np.savez(file, **(arrays | {field: array}))
    with pytest.raises(SystemExit) as stop:
        main(["parity", str(file)])
    assert stop.value.code == 1
    said = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == [file.name, "model", "FAILS"] for line in said)
    assert any(line.startswith(f"{file.name}: ") and "is off by" in line for line in said)


def meta(arrays: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return arrays | {"meta": np.array(json.dumps(json.loads(str(arrays["meta"])) | changes))}


def bad_files() -> list[tuple[str, dict[str, Any], str]]:
    """A file's name, its contents, and what the sentence must hold."""
    hstu, ranking, trajectory = (recorded(n) for n in ("retrieval_hstu_base", "ranking_stu_stack", "trajectory_hstu"))
    uvqk, embedding = "_hstu._attention_layers.0._uvqk", "_embedding_module._item_emb.weight"
    without = {name: array for name, array in hstu.items() if name != f"grad/{uvqk}"}
    lengths, ids, times = (np.array(hstu[f"in/{n}"]) for n in ("lengths", "ids", "timestamps"))
    lengths[:2], ids[0, 0], times[0, 0] = (43, 4), 0, -1
    late = np.array(hstu["in/ids"])
    late[0, -1] = 3
    return [
        ("retrieval_a", {"meta": hstu["meta"]}, "lacks in/ids, in/timestamps, in/lengths, in/negative_ids, out/enc"),
        ("retrieval_a", without, f"grad lacks {uvqk}"),
        ("retrieval_a", hstu | {"param/more": ids}, "param holds what the model has not: more"),
        ("retrieval_a", meta(hstu, num_items=96), "must be items from 1 to 96"),
        ("retrieval_a", meta(hstu, num_items=98), f"param: {embedding} has shape [98, 24], the model needs [99, 24]"),
        ("retrieval_a", meta(hstu, kind="gru"), "kind must begin with hstu or sasrec, it is 'gru'"),
        ("retrieval_a", meta(hstu, heads=0), "meta's heads must be a whole number from 1 on, it is 0"),
        ("retrieval_a", meta(hstu, padded_len=11), "padded_len must exceed 11"),
        ("retrieval_a", meta(hstu, temperature=0), "temperature must be positive, it is 0"),
        ("retrieval_a", hstu | {"in/lengths": lengths}, "in/lengths must leave a place for the target in 43 places"),
        ("retrieval_a", hstu | {"in/ids": ids}, "in/ids must be items from 1 to 97 up to the target, and 0 after it"),
        ("retrieval_a", hstu | {"in/ids": late}, "in/ids must be items from 1 to 97 up to the target, and 0 after it"),
        ("retrieval_a", hstu | {"in/timestamps": times}, "in/timestamps must be seconds below 2**31"),
        ("retrieval_a", hstu | {"in/negative_ids": 0 * hstu["in/negative_ids"]}, "in/negative_ids must be items"),
        ("retrieval_a", hstu | {"out/loss": np.zeros(2)}, "out/loss has shape [2], expected []"),
        ("retrieval_a", meta(hstu, kind="sasrec", heads=5), "meta's D (24) must be a multiple of its heads (5)"),
        ("ranking_a", meta(ranking, layers=3), "param lacks _stu_layers.2._uvqk_weight"),
        ("ranking_a", ranking | {"dout": ranking["dout"][1:]}, "dout has shape [168, 32], expected [169, 32]"),
        ("ranking_a", ranking | {"num_targets": np.array([1])}, "num_targets must hold a count for each of the 4"),
        ("trajectory_a", meta(trajectory, steps=29), "in/ids has shape [30, 6, 43], expected [29, 6, 43]"),
        ("trajectory_a", meta(trajectory, optimizer="sgd"), "optimizer must be adamw, it is 'sgd'"),
        ("trajectory_a", meta(trajectory, betas=0.9), "betas must be two numbers, they are 0.9"),
        ("trajectory_a", trajectory | {"in/lengths": trajectory["in/lengths"][0]}, "in/lengths must be [steps, B]"),
        (
            "trajectory_a",
            trajectory | {"in/negative_ids": trajectory["in/negative_ids"][:, :50]},
            "must have a row for",
        ),
    ]


def test_bad_contents_are_one_sentence(tmp_path: Path) -> None:
    for name, contents, words in bad_files():
        with pytest.raises(UserError) as error:
            case_of(tmp_path, name, contents)
        assert str(error.value).startswith(str(tmp_path / name)), words
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_renamed_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    for name in BY_NAME:
        other = tmp_path / "renamed.npz"
        other.write_bytes(BY_NAME[name].read_bytes())
        assert read_case(other).gradients.keys() == read_case(BY_NAME[name]).gradients.keys()
