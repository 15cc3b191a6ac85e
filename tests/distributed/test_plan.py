"""Plans: names of topologies, roofs, the ranking of meshes, refusals, what does not fit; what is compiled or estimated
of a step is in test_mesh and test_estimates."""

import dataclasses
import functools
import sys
from types import SimpleNamespace

import jax
import pytest

from experiments import plan as command
from experiments.cli import main
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.schema import Schema
from genrec_jax.distributed import plan as plans
from genrec_jax.distributed import topology as topologies
from genrec_jax.distributed.collectives import Collective
from genrec_jax.distributed.mesh import make_mesh
from genrec_jax.distributed.plan import Plan
from genrec_jax.distributed.topology import parse_topology, slices
from genrec_jax.errors import UserError
from kernels_pallas.target import compiling_for, target


def test_topologies_by_name() -> None:
    assert (parse_topology("v5e:16x16").chips, parse_topology("v5p:8x16x16").devices) == (256, 2048)
    assert parse_topology("tpu7x:2x2x1").devices == 8  # two on a chip
    assert [t.name for t in slices(parse_topology("v5e:8x8"))][-3:] == ["v5e:8x8", "v5e:8x16", "v5e:16x16"]
    for text in ("v5e", "v5e:3x3", "v9:2x2", "v5e:2x2x1"):
        with pytest.raises(UserError, match=r"--topology '.*': the (kinds|shapes)"):
            parse_topology(text)


def test_programs_are_made_for_another_target() -> None:
    assert target() == jax.default_backend()
    with compiling_for("tpu"):
        assert target() == "tpu"
    assert target() == jax.default_backend()


V5E = topologies.CHIPS["v5e"]
SMALL = Plan(parse_topology("v5e:2x2"), {"data": 4}, {"parameters": 1e9, "optimiser": 2e9}, batch=5e8, temporaries=5e8)


def test_the_longest_part_bounds_a_step() -> None:
    """Of 197 TFLOP/s, 819 GB/s and 200 GB/s."""
    busy = dataclasses.replace(SMALL, flops=197e9, traffic=819e6, collectives=(Collective("all-reduce", 4, 1, 8e8),))
    assert busy.seconds() == pytest.approx({"products": 1e-3, "HBM": 1e-3, "links": 4e-3})
    assert busy.least_seconds == pytest.approx(4e-3)
    assert busy.mfu == pytest.approx(0.25)
    assert busy.requests_per_second == 0
    assert dataclasses.replace(busy, requests=8).requests_per_second == pytest.approx(2000)
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
            "its activations and temporaries alone take 50.67GiB of a device's 31.24GiB",
        ),
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm. Exceeded.", "it takes 20.5GiB of a device's 15.75GiB"),
        ("RESOURCE_EXHAUSTED: something\nelse", "RESOURCE_EXHAUSTED: something"),
    ],
)
def test_why_it_does_not_fit(message: str, said: str) -> None:
    assert plans._reason(message) == said


@functools.cache
def compiled_once(trial: Trial, schema: Schema, steps: int, remat: bool) -> list[Plan]:
    return plans.plans_on(make_mesh({"data": 1}), trial, schema, parse_topology("v5e:1x1"), steps, remat)


def test_offloaded_state_is_the_hosts_and_not_the_devices() -> None:
    """Every array of the optimiser but those under 1,024 numbers, and the program still compiles."""
    trial = override(default_trial("dlrm"), {"train.batch_rows": 8, "data.history": 8})
    schema, mesh = Schema(2001, ("click",)), make_mesh({"data": 1})
    asked = (mesh, trial, schema, parse_topology("v5e:1x1"), 10, False)
    (there,) = plans.plans_on(*asked, False, ("training",))
    (here,) = plans.plans_on(*asked, True, ("training",))
    assert there.host == 0.0
    assert here.host > 0.9 * (there.state["optimiser"] + there.state["optimiser of tables"])
    assert here.host + sum(here.state.values()) == sum(there.state.values())
    assert not here.problem


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are compiled for one CPU, and reported as those of the topology."""

    def here(trial, schema, topology, sizes, steps, remat, offload, asked):
        assert not offload
        found = compiled_once(trial, schema, steps, remat)
        both = [dataclasses.replace(plan, topology=topology, mesh=sizes) for plan in found]
        return [plan for plan, name in zip(both, plans.PROGRAMS, strict=True) if name in asked]

    monkeypatch.setattr(command, "prepare", lambda quick: None)
    monkeypatch.setattr(command, "compiled_plans", here)


def planned(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["plan", *args])
    return done.value.code


def test_the_command_prints_a_plan(compiled_here: None, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--set", "model.depth=1", "--set", "model.sampling=popularity")
    assert planned("ml-1m-sasrec", "--topology", "v5e:2x2", *settings) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    training, scoring = told.split(" requests beside that state; per device:")
    assert "ml-1m-sasrec on v5e:2x2 (4 chips), mesh data=4; per device:" in training
    for line in ("tables", "optimiser of tables", "MFU", "4,848 steps", "chip-hours"):
        assert line in training, line
    assert "requests a second at most" in scoring
    for line in ("activations, temporaries", "of 16 GiB", "HBM traffic", "at least, bound by"):
        assert line in training, line
        assert line in scoring, line


@pytest.mark.parametrize(("program", "name"), [(0, "A training step"), (1, "Scoring")])
def test_what_is_too_big_is_told_what_it_fits_on(
    compiled_here: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: int,
    name: str,
) -> None:
    """One of the two programs needs sixteen devices. Where the state alone has no
    room the compiler is not asked, and a mesh that divides all of it is not tried on fewer devices."""
    real, asked = command.compiled_plans, []

    def full(trial, schema, topology, sizes, steps, remat, offload, programs):
        asked.append(f"{topology.name} {command.mesh_name(sizes)}")
        found = real(trial, schema, topology, sizes, steps, remat, offload, plans.PROGRAMS)
        if topology.chips < 16:
            found[program] = dataclasses.replace(found[program], problem="it takes 20G of 16G", gathered=2.0**30)
        return [plan for plan, own in zip(found, plans.PROGRAMS, strict=True) if own in programs]

    monkeypatch.setattr(command, "compiled_plans", full)
    model = ("dlrm", "--topology", "v5e:2x2", "--items", "50", "--set", "train.batch_rows=64")
    assert planned(*model) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert f"{name} does not fit: it takes 20G of 16G (every device gathers 1 GiB of tables)." in told
    assert told.count("does not fit") == 1
    assert "The smallest slice that it fits on is v5e:4x4 with --mesh fsdp=16" in told
    assert asked == ["v5e:2x2 data=4", "v5e:1x1 fsdp=1", "v5e:2x2 fsdp=4", "v5e:2x4 fsdp=8", "v5e:4x4 fsdp=16"]
    asked.clear()
    assert planned(*model, "--mesh", "fsdp=4") == 1
    assert asked == ["v5e:2x2 fsdp=4", "v5e:2x4 fsdp=8", "v5e:4x4 fsdp=16"]
    capsys.readouterr()
    assert planned(*model, "--search") == 1
    assert capsys.readouterr().out.count("does not fit") == 3
    monkeypatch.setattr(topologies, "CHIPS", topologies.CHIPS | {"v5e": dataclasses.replace(V5E, memory=1e4)})
    asked.clear()
    assert planned(*model) == 1
    assert asked == ["v5e:2x2 data=4", "v5e:4x8 fsdp=32", "v5e:8x8 fsdp=64"]  # where the state of 306 KiB has room
    told = " ".join(capsys.readouterr().out.split())
    assert "No slice up to 64 devices (train.batch_rows) was found that it fits on." in told


def test_a_search_asks_for_the_scoring_of_the_best_mesh_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPUs, whose plans cost nothing. Where the best mesh cannot score, the next is asked."""
    real, asked = command.estimated_plans, []

    def counted(trial, schema, topology, sizes, steps, remat, programs):
        asked.append((command.mesh_name(sizes), *programs))
        found = real(trial, schema, topology, sizes, steps, remat, programs)
        no_room = programs == ("scoring",) and sum("scoring" in one for one in asked) == 1
        return [dataclasses.replace(plan, temporaries=1e15) for plan in found] if no_room else found

    monkeypatch.setattr(command, "estimated_plans", counted)
    model = ("hstu", "--topology", "h100:4", "--items", "50", "--set", "train.batch_rows=64")
    assert planned(*model, "--set", "model.heads=4", "--search") == 0
    out = capsys.readouterr().out
    told, ranking = " ".join(out.split()), out.partition("bound by")[2]
    tried = [mesh for mesh, program in asked if program == "training"]
    assert {"data=4", "fsdp=4", "fsdp=2,context=2", "model=4"} <= set(tried)
    assert all(f" {mesh} " in ranking for mesh in tried)  # none is cut short at 80 columns
    assert max(map(len, out.splitlines())) <= 80
    scored = [mesh for mesh, program in asked if program == "scoring"]
    assert len(scored) == 2
    assert f"Scoring with {scored[0]} does not fit: it needs" in told
    assert f"scoring with {scored[1]}: " in told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dlrm", "--topology", "h100:3", "--items", "9"], "the shapes of h100 are 1, 2, 4"),
        (["hstu", "--topology", "h100:8", "--items", "9", "--mesh", "context=8"], "must be a multiple of the mesh's"),
        (["dlrm", "--topology", "h100:8", "--items", "9", "--set", "train.batch_rows=9"], "must be a multiple of 8"),
        (["dlrm", "--topology", "h100:8", "--items", "9", "--quick"], "--quick is for TPUs alone"),
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
    monkeypatch.setattr(command, "prepare", lambda quick: None)
    assert planned(*given) == 2
    assert said in capsys.readouterr().err


def test_quick_plans_are_of_a_compiler_that_optimises_little(
    tmp_path, compiled_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topologies, "LIBTPU", tmp_path)
    monkeypatch.setattr(topologies, "os", SimpleNamespace(environ={}))
    monkeypatch.setattr(topologies, "sys", SimpleNamespace(path=[], modules=sys.modules))
    monkeypatch.setattr(command, "prepare", topologies.prepare)
    before = jax.config.jax_optimization_level
    try:
        settings = ("--set", "model.depth=1", "--set", "model.sampling=popularity")
        assert planned("ml-1m-sasrec", "--topology", "v5e:2x2", *settings) == 0
        assert jax.config.jax_optimization_level == before
        assert "rough" not in capsys.readouterr().out
        assert planned("ml-1m-sasrec", "--topology", "v5e:2x2", "--quick", *settings) == 0
        assert jax.config.jax_optimization_level == topologies.os.environ["JAX_OPTIMIZATION_LEVEL"] == "O0"
        assert "compiled with little optimisation" in capsys.readouterr().out
    finally:
        jax.config.update("jax_optimization_level", before)


def test_without_the_compiler_it_says_how_to_get_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(topologies, "LIBTPU", tmp_path / "none")
    assert planned("ml-1m-hstu", "--topology", "v5e:2x2") == 2
    assert "`make tpu-compiler` installs it" in capsys.readouterr().err
