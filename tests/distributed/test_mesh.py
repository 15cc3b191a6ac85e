"""Meshes: the numbers of one device; any number of devices goes on with a run; what cannot be is refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.cli import main
from genrec_jax.data.sequences import Sequences
from genrec_jax.distributed.collectives import KINDS
from genrec_jax.distributed.mesh import make_mesh, parse_mesh
from genrec_jax.errors import UserError
from genrec_jax.nn import embedding
from genrec_jax.train import loop
from tests.data.helpers import random_dataset
from tests.distributed.on_devices import BY_HAND, CASES, LENT
from tests.train.helpers import Stopped, lines, trial_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=60)


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What tests/distributed/on_devices.py found on eight devices."""
    command = [sys.executable, "-m", "tests.distributed.on_devices", str(tmp_path_factory.mktemp("eight"))]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_follow_one(on_devices: dict[str, dict[str, float]]) -> None:
    """Fifty steps of each model with the same draws: losses and parameters of a single device."""
    found = {name: case for name, case in on_devices.items() if "loss" in case}
    usual = {f"{name} {mesh}" for name, _, meshes in CASES for mesh in meshes} - BY_HAND
    assert set(found) == usual | {f"large {name} {mesh}" for name, _, meshes, _ in LENT for mesh in meshes}
    for name, case in found.items():
        assert case["loss"] < 1e-5, name
        assert case["params"] < 1e-4, name
        assert case["spread"] > 0.01, name  # losses that change, and by far more than they come apart
        if name.startswith("large"):
            blocks = math.prod(int(name.partition(f"{axis}=")[2][:1] or 1) for axis in ("data", "fsdp"))
            assert case["held"] < max(0.5, 1 / blocks + 0.2), name
            continue
        shares = math.prod(int(name.partition(f"{axis}=")[2][:1] or 1) for axis in ("fsdp", "model"))
        assert 1 / shares <= case["held"] < 1 / shares + 0.2, name  # some arrays are small, or cannot be divided evenly


@pytest.mark.parametrize(("mesh", "fsdp"), [("data=8", 1), ("fsdp=8", 8), ("data=2,fsdp=4", 4)])
def test_collectives_are_those_of_the_hand_count(on_devices: dict[str, dict[str, float]], mesh: str, fsdp: int) -> None:
    """What is divided is gathered once and its gradient divided once; a sum over data of the shares, and over all
    devices of the rest, of the loss and of the number of targets. Norms of shares are a few numbers more."""
    found = on_devices[f"sent {mesh}"]
    divided, whole = found["divided"], found["whole"]
    assert found["held"] == divided / fsdp + whole
    assert (divided > 10 * whole) == (fsdp > 1)
    assert found["all-gather"] == found["reduce-scatter"] == divided
    shares = divided / fsdp if mesh.startswith("data=2") else 0
    assert 0 <= found["all-reduce"] - (whole + shares + 8) <= 128
    assert found["all-to-all"] == found["collective-permute"] == 0


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_large_tables_are_exchanged_as_the_hand_count_says(on_devices: dict[str, dict[str, float]], mesh: str) -> None:
    """Eight devices of 2 rows, with 32 items each: 64 reads, so an even share of 8, and boxes of 24 rows. Ids go out,
    bfloat16 rows come back, float32 gradients go out. Nothing else has to do with the table."""
    found = on_devices[f"lent {mesh}"]
    assert found["table"] == found["of"] / 8
    assert found["all-to-all"] == 8 * 24 * (4 + 2 * found["width"] + 4 * found["width"])
    assert found["all-gather"] + found["all-reduce"] < 1.5 * found["others"] + 512
    assert (found["all-gather"] > 0) == ("fsdp" in mesh)
    assert found["collective-permute"] == 0


def test_a_context_exchanges_what_the_hand_count_says(on_devices: dict[str, dict[str, float]]) -> None:
    """Two shares of 8 rows, four chunks of a row each. Of each of three blocks queries, keys and values go out and the
    result comes back, and so do their derivatives; the whole row is put together once in either pass. Derivatives of
    blocks are summed over the context, and all of them over the rows."""
    found = on_devices["exchanged data=2,context=4"]
    assert found["tokens"] % 4  # the last chunk has padding
    chunk = 8 * -(-found["tokens"] // 4) * 64 * 4
    assert found["all-to-all"] == 3 * 2 * 4 * chunk
    assert found["all-gather"] == 2 * 4 * chunk
    parameters = found["whole"] + found["taken"] + found["gathered"]
    assert 0 <= found["all-reduce"] - (found["blocks"] + parameters + 8) <= 128
    assert found["reduce-scatter"] == found["collective-permute"] == 0


def test_divided_heads_send_what_the_hand_count_says(on_devices: dict[str, dict[str, float]]) -> None:
    """Two shares of 8 rows, heads divided among four devices. Matrices of the three blocks are exchanged for a device's
    part and their derivatives come back; other large arrays are gathered, whose derivatives each device has. Of each
    block the result is summed in one pass and the derivative of its input in the other, and in both the two statistics
    of the normalisation over all heads; and the derivatives of both tables of relative bias. Over the rows, a
    device's share of all derivatives."""
    found = on_devices["exchanged data=2,model=4"]
    tokens = 8 * found["tokens"] * 4
    assert found["taken"] > 0.9 * found["blocks"]
    assert found["all-to-all"] == 2 * found["taken"] / 4
    assert found["all-gather"] == found["gathered"]
    sums = 3 * (2 * tokens * 64 + 2 * 2 * tokens) + found["biases"]
    over_rows = found["whole"] + (found["taken"] + found["gathered"]) / 4
    assert 0 <= found["all-reduce"] - (sums + over_rows + 8) <= 128
    assert found["reduce-scatter"] == found["collective-permute"] == 0


def test_estimates_are_what_is_compiled(on_devices: dict[str, dict[str, float]]) -> None:
    """What a plan for GPUs says of a step and of a scoring without a compiler: of every kind the bytes of the compiled
    program, but for norms, the loss and other small sums."""
    cases = {name: found for name, found in on_devices.items() if "estimated state" in found}
    assert len(cases) == 7
    for name, found in cases.items():
        assert found["estimated state"] == 0, name
        for program in ("", "scoring "):
            for kind in KINDS:
                compiled, estimated = found[program + kind], found["estimated " + program + kind]
                assert abs(estimated - compiled) <= 256 + 0.001 * compiled, (name, program, kind)


def test_heads_that_a_context_does_not_divide_are_refused(sequences: Sequences, tmp_path: Path) -> None:
    trial, mesh = trial_of(sequences, "hstu", **{"model.heads": 2}), jax.sharding.AbstractMesh((4,), ("context",))
    with pytest.raises(UserError, match=r"model.heads \(2\) must be a multiple of the mesh's context \(4\)"):
        loop.train(trial, tmp_path / "run", mesh=mesh)
    mesh = jax.sharding.AbstractMesh((2, 2), ("context", "model"))
    with pytest.raises(UserError, match=r"multiple of the mesh's context \(2\) times model \(2\)"):
        loop.train(trial, tmp_path / "run", mesh=mesh)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "settings", "devices", "large"),
    [
        ("hstu", {"model.heads": 2}, "fsdp=2", 2**14),
        ("hstu", {"model.heads": 2}, "context=2", 2**14),
        ("dirl", {"model.heads": 2, "model.experts": 3}, "model=2", 2**14),
        ("sasrec", {"model.negatives": 3}, "fsdp=2", 2**14),
        ("sasrec", {"model.negatives": 0}, "data=2", 16),
        ("dlrm", {"train.embedding_optimizer": "rowwise_adagrad"}, "data=2", 16),
    ],
)
def test_a_run_goes_on_with_other_devices(
    sequences: Sequences,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    settings: dict,
    devices: str,
    large: int,
) -> None:
    """On two devices up to a kill and on one after it, evaluations included, as on one from the beginning. Tables of
    ``large`` ids or more are divided by rows."""
    monkeypatch.setattr(embedding, "LARGE", large)
    monkeypatch.setattr(embedding, "SPREAD", 8)
    retrieval = {"data.candidates": 1, "model.heads": 2} if model == "sasrec" else {}
    trial = trial_of(sequences, model, **{"train.pieces": 4, "train.validations": 4, **settings, **retrieval})
    whole = loop.train(trial, tmp_path / "one")
    mesh = make_mesh(parse_mesh(devices))

    def kill(record: dict) -> None:
        if record["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        loop.train(trial, tmp_path / "cut", mesh=mesh, on_progress=kill)
    cut = loop.train(trial, tmp_path / "cut")
    two = loop.train(trial, tmp_path / "two", mesh=mesh)
    assert (whole["devices"], cut["devices"], two["devices"]) == (1, 1, 2)
    for other, folder in ((cut, "cut"), (two, "two")):
        assert other["steps"] == whole["steps"]
        for one, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / folder), strict=True):
            assert theirs == pytest.approx(one, rel=1e-5, abs=1e-7)
        numbers = {key: whole[key] for key in whole if key.startswith(("ne", "auc", "hr@", "ndcg@", "mrr", "test/"))}
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)
        assert other["eval_set"] == whole["eval_set"]


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=x", "rows=2", "data=1,data=2", "data=-1"])
def test_a_mesh_that_is_none_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"is not of the form AXIS=DEVICES,…; the axes are: data, fsdp, context, model"):
        parse_mesh(text)


def test_what_does_not_fit_is_refused(sequences: Sequences, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    given = ["train", "--data", str(sequences.path), "--model", "dlrm", "--out", str(out), "--quiet"]
    for more, said in (
        (["--mesh", "data=512"], f"the mesh needs 512 devices, {jax.device_count()} are here"),
        (["--mesh", "data=2", "--set", "train.batch_rows=3"], "train.batch_rows (3) must be a multiple of 2"),
        (["--mesh", "rows=2"], "the axes are: data, fsdp"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*given, *more])
        assert said in capsys.readouterr().err
        assert not (out / "result.json").exists()
        assert not (out / "config.json").exists()


def test_the_command_trains_on_a_mesh(sequences: Sequences, tmp_path: Path) -> None:
    given = ["train", "--data", str(sequences.path), "--model", "dlrm", "--out", str(tmp_path / "run"), "--quiet"]
    main([*given, "--mesh", "data=2", "--set", "train.steps=3", "--set", "data.history=8"])
    record = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert record["devices"] == 2
    assert np.isfinite(record["ne"])
