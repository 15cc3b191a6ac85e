"""Plans: names of topologies, roofs, the ranking of meshes, refusals; the compiled step itself is in test_mesh."""

import dataclasses

import jax
import pytest

from experiments import plan as command
from experiments.cli import main
from genrec_jax.config import default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.distributed import plan as plans
from genrec_jax.distributed import topology as topologies
from genrec_jax.distributed.collectives import Collective
from genrec_jax.distributed.mesh import make_mesh, parse_mesh
from genrec_jax.distributed.plan import Plan
from genrec_jax.distributed.topology import larger, parse_topology
from genrec_jax.errors import UserError
from genrec_jax.train.estimate import abstract_model
from kernels_pallas.target import compiling_for, target


def test_topologies_by_name() -> None:
    assert (parse_topology("v5e:16x16").chips, parse_topology("v5p:8x16x16").devices) == (256, 2048)
    assert parse_topology("tpu7x:2x2x1").devices == 8  # two on a chip
    assert [t.name for t in larger(parse_topology("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
    for text in ("v5e", "v5e:3x3", "v9:2x2", "v5e:2x2x1"):
        with pytest.raises(UserError, match=r"--topology '.*': the (kinds|shapes)"):
            parse_topology(text)


def test_programs_are_made_for_another_target() -> None:
    assert target() == jax.default_backend()
    with compiling_for("tpu"):
        assert target() == "tpu"
    assert target() == jax.default_backend()


SMALL = Plan(parse_topology("v5e:2x2"), {"data": 4}, {"parameters": 1e9, "optimiser": 2e9}, batch=5e8, temporaries=5e8)


def test_the_longest_part_bounds_a_step() -> None:
    """Of 197 TFLOP/s, 819 GB/s and 200 GB/s."""
    busy = dataclasses.replace(SMALL, flops=197e9, traffic=819e6, collectives=(Collective("all-reduce", 4, 1, 8e8),))
    assert busy.seconds() == pytest.approx({"products": 1e-3, "HBM": 1e-3, "links": 4e-3})
    assert busy.step_seconds == pytest.approx(4e-3)
    assert busy.mfu == pytest.approx(0.25)
    assert busy.memory == 4e9
    assert busy.fits
    assert not dataclasses.replace(busy, temporaries=2e10).fits
    assert not dataclasses.replace(busy, problem="no").fits


def test_meshes_that_fit_are_ranked_by_time_then_memory() -> None:
    slow, fast = (dataclasses.replace(SMALL, traffic=x) for x in (2e9, 1e9))
    lean, big = dataclasses.replace(fast, batch=0.0), dataclasses.replace(fast, traffic=0.0, temporaries=2e10)
    assert command.ranked([big, slow, fast, lean]) == [lean, fast, slow, big]
    rows = [{"data": 64}, {"data": 16, "fsdp": 4}, {"data": 4, "fsdp": 16}, {"fsdp": 64}]
    assert command.meshes(64, rows=64, heads=1) == rows
    assert command.meshes(64, rows=64, heads=8) == [
        *rows,
        {"fsdp": 32, "context": 2},
        {"fsdp": 8, "context": 8},
        {"fsdp": 32, "model": 2},
        {"fsdp": 8, "model": 8},
    ]
    assert command.meshes(4, rows=1, heads=4) == [{"context": 4}, {"model": 4}]
    assert command.meshes(8, rows=2, heads=4) == [{"fsdp": 2, "context": 4}, {"fsdp": 2, "model": 4}]
    assert command.meshes(1, rows=1, heads=8) == [{"data": 1}]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(50.67G) exceeds available HBM (31.24G). HLO module: jit_step.",
            "the activations and temporaries of a step alone take 50.67GiB of a device's 31.24GiB",
        ),
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm. Exceeded.", "a step takes 20.5GiB of a device's 15.75GiB"),
        ("RESOURCE_EXHAUSTED: something\nelse", "RESOURCE_EXHAUSTED: something"),
    ],
)
def test_why_it_does_not_fit(message: str, said: str) -> None:
    assert plans._reason(message) == said


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are compiled for one CPU, and reported as those of the topology."""

    def here(trial, schema, topology, sizes, steps, remat):
        found = plans.plan_on(make_mesh(parse_mesh("data=1")), trial, schema, topology, steps, remat)
        return dataclasses.replace(found, mesh=sizes)

    monkeypatch.setattr(command, "prepare", lambda: None)
    monkeypatch.setattr(command, "plan_step", here)


def planned(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["plan", *args])
    return done.value.code


def test_the_command_prints_a_plan(compiled_here: None, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "model.depth=1", "--set", "model.sampling=popularity")
    assert planned("ml-1m-sasrec", "--topology", "v5e:2x2", *settings) == 0
    told = capsys.readouterr().out
    assert "ml-1m-sasrec on v5e:2x2 (4 chips), mesh data=4; per device:" in told
    for line in ("tables", "optimiser of tables", "of 16 GiB", "at least, bound by", "4,848 steps", "chip-hours"):
        assert line in told, line


def test_what_is_too_big_is_told_what_it_fits_on(
    compiled_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = command.plan_step

    def full(trial, schema, topology, sizes, steps, remat):
        found = real(trial, schema, topology, sizes, steps, remat)
        return found if topology.chips >= 16 else dataclasses.replace(found, problem="a step needs 20G of 16G")

    monkeypatch.setattr(command, "plan_step", full)
    model = ("dlrm", "--topology", "v5e:2x2", "--items", "50", "--set", "train.batch_rows=64")
    assert planned(*model) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "It does not fit: a step needs 20G of 16G." in told
    assert "The smallest slice that it fits on is v5e:4x4 with --mesh fsdp=16" in told
    assert planned(*model, "--search") == 1
    assert capsys.readouterr().out.count("does not fit") == 3


def test_gpus_are_estimated_without_a_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, of one row: 3 x forward FLOPs at 989 TFLOP/s; between nodes an adapter's 50 GB/s."""
    trial, schema = override(default_trial("dlrm"), {"train.batch_rows": 64}), Schema(50, ("click",))
    one = plans.estimated_step(trial, schema, parse_topology("h100:1"), {"data": 1}, 10)
    row = abstract_model(trial, schema).cost(trial.data.shape)
    assert one.flops == 3 * row.flops * 64
    assert one.seconds()["products"] == pytest.approx(one.flops / 989e12)
    assert one.collectives == ()
    params = 4.0 * (row.dense_params + row.embedding_params)
    assert one.state["parameters"] + one.state["tables"] == params
    assert one.temporaries == row.activation_bytes * 64 + params
    many = plans.estimated_step(trial, schema, parse_topology("h100:16"), {"data": 16}, 10)
    assert many.flops == one.flops / 16
    assert many.sent == pytest.approx(2 * 15 / 16 * params)
    assert many.seconds()["links"] == pytest.approx(many.sent / 50e9)
    assert planned("dlrm", "--topology", "h100:8", "--items", "50", "--set", "train.batch_rows=64") == 0
    assert "estimated from the model's own accounts; nothing was compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dlrm", "--topology", "h100:3", "--items", "9"], "the shapes of h100 are 1, 2, 4"),
        (["dlrm", "--topology", "h100:8", "--items", "9", "--remat"], "knows no --remat, no context and no model"),
        (["dlrm", "--topology", "h100:8", "--items", "9", "--set", "train.batch_rows=9"], "must be a multiple of 8"),
        (["nothing", "--topology", "v5e:2x2"], "'nothing' is neither a recipe (amazon-books-hstu"),
        (["dlrm", "--topology", "v5e:2x2"], "needs --items"),
        (["dlrm", "--topology", "v5e:2x2", "--items", "0"], "--items must be at least 1, not 0"),
        (["ml-1m-hstu", "--topology", "v5e:2x2", "--items", "3"], "--items and --task go with a model"),
        (["ml-1m-hstu", "--topology", "v5e:5x5"], "the shapes of v5e are"),
        (["ml-1m-hstu", "--topology", "v5e:2x2", "--search", "--mesh", "data=4"], "takes no --mesh"),
        (["ml-1m-hstu", "--topology", "v5e:2x2", "--mesh", "data=3"], "the mesh has 3 devices, v5e:2x2 has 4"),
    ],
)
def test_bad_input_is_one_sentence(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "prepare", lambda: None)
    assert planned(*given) == 2
    assert said in capsys.readouterr().err


def test_without_the_compiler_it_says_how_to_get_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topologies, "LIBTPU", tmp_path / "none")
    assert planned("ml-1m-hstu", "--topology", "v5e:2x2") == 2
    assert "`make tpu-compiler` installs it" in capsys.readouterr().err
