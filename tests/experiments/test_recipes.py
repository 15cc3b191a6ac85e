"""Published recipes: complete and as published; the page of results says what the records say; shuffled ties."""

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import recipes
from experiments.cli import main
from experiments.recipe import plan_recipe
from experiments.retrieval_choices import STUDY as CHOICES
from experiments.retrieval_page import tables
from experiments.retrieval_runs import METRICS, read_runs, write_datasets
from experiments.shuffled_ties import shuffle_ties
from experiments.table import flatten
from genrec_jax.config import default_trial, trial_from_json
from genrec_jax.data.sequences import Sequences, load
from genrec_jax.errors import UserError
from tests.data.helpers import dataset, owner, random_dataset

# The public code's configurations: D, blocks, heads, width of a head, dropout, history, negatives, epochs.
PUBLISHED = {
    "ml-1m-sasrec": (50, 2, 1, None, 0.2, 200, 128, 101),
    "ml-1m-hstu": (50, 2, 1, 50, 0.2, 200, 128, 101),
    "ml-1m-hstu-large": (50, 8, 2, 25, 0.2, 200, 128, 101),
    "ml-20m-sasrec": (256, 4, 4, None, 0.2, 200, 128, 101),
    "ml-20m-hstu": (256, 4, 4, 64, 0.2, 200, 128, 101),
    "ml-20m-hstu-large": (256, 16, 8, 32, 0.2, 200, 128, 101),
    "amazon-books-sasrec": (64, 4, 4, None, 0.5, 50, 512, 201),
    "amazon-books-hstu": (64, 4, 4, 16, 0.5, 50, 512, 201),
    "amazon-books-hstu-large": (64, 16, 8, 8, 0.5, 50, 512, 201),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_complete_and_as_published(name: str) -> None:
    recipe = recipes.read(name)
    keys = set(flatten(default_trial(recipe.model).to_json(), ".")) - {"model.name"}
    assert set(recipe.values) == keys - recipes.LEFT_OPEN
    for protocol, select in (("original", "last"), ("honest", "best")):
        trial = recipe.trial(protocol, seed=3)
        model, train = trial.model, trial.train
        found = (model.width, model.depth, model.heads, getattr(model, "qk_width", None), model.dropout)
        assert (*found, trial.data.history, model.negatives, train.epochs) == PUBLISHED[name]
        assert getattr(model, "v_width", None) == getattr(model, "qk_width", None)
        assert (train.batch_rows, train.learning_rate, train.embedding_learning_rate) == (128, 1e-3, 1e-3)
        assert (train.beta1, train.beta2, train.weight_decay, train.clip, train.warmup) == (0.9, 0.98, 0, 0, 0)
        assert (train.decay, model.temperature, trial.data.packing) == ("constant", 0.05, "batch")
        assert (trial.data.protocol, train.select, trial.seed) == (protocol, select, 3)
        assert train.epochs % train.validations == 0
        assert trial_from_json(trial.to_json()) == trial


def test_there_is_no_other_recipe_and_an_unknown_one_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipes.names() == sorted(PUBLISHED)
    with pytest.raises(SystemExit, match="2"):
        main(["recipe", "ml-2m", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert said.startswith("error: unknown recipe 'ml-2m'; there is: amazon-books-hstu,")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_fewer_epochs_are_evaluated_as_often(tmp_path: Path) -> None:
    sequences = random_dataset(tmp_path / "d", users=60)
    ml1m, books = recipes.read("ml-1m-hstu"), recipes.read("amazon-books-hstu")
    assert ml1m.trial("honest", 0, 7).train.validations == 7
    assert [books.trial("honest", 0, n).train.validations for n in (1, 3, 9)] == [1, 1, 3]
    planned = plan_recipe(ml1m, sequences, [4, 5], ["original", "honest"], 2)
    assert [(one.label, one.trial.seed) for one in planned] == [
        (label, seed) for label in ("original", "honest") for seed in (4, 5)
    ]
    assert {one.trial.data.digest for one in planned} == {sequences.digest}
    assert len({one.trial.hash for one in planned}) == 4


def metrics_of(draw: np.random.Generator, part: str = "") -> dict[str, float]:
    return {part + name: float(draw.random()) for name in METRICS}


def write_trial(folder: Path, place: tuple[str, str, str], seed: int, draw: np.random.Generator, **more: Any) -> None:
    """A finished trial of three epochs of two steps whose numbers are random, or an unfinished one."""
    study, family, label = place
    original = label == "original"
    config = {"data": {"protocol": label if original else "honest", "digest": more["digest"]}, "train": {"epochs": 3.0}}
    (folder / "checkpoints").mkdir(parents=True)
    write = {"config.json": {**config, "seed": seed}}
    write["plan.json"] = {
        "placements": [{"study": study, "family": family, "label": label, "axis": "x", "axis_value": 1}]
    }
    part = "test/" if original else "validation/"
    lines = []
    for step in range(1, 7):
        lines.append({"step": step, "steps": 6, "loss": 1.0})
        if step % 2 == 0:
            lines.append({"step": step, "steps": 6, **metrics_of(draw, part)})
    if more.get("finished", True):
        result = {
            "status": "done",
            "steps": 6,
            "tested_step": 6 if original else 4,
            "dataset": "d",
            "train_seconds": 2.0,
            "device": "abacus",
            "finished": f"2026-01-0{1 + seed}",
            "version/jax": "1.2",
        }
        tested = {k.removeprefix(part): v for k, v in lines[-1].items()} if original else metrics_of(draw)
        write["result.json"] = {**tested, **result}
    for name, record in write.items():
        (folder / name).write_text(json.dumps(record), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"cut', encoding="utf-8"
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of a recipe by both protocols, one still at work, and two choices of the study, one with one seed."""
    sequences = random_dataset(tmp_path / "d", users=60)
    draw, out = np.random.default_rng(0), tmp_path / "out"
    out.mkdir()
    write_datasets(out, sequences)
    own = {"digest": sequences.digest}
    for seed in (0, 1):
        write_trial(out / f"trials/o{seed}", ("recipes", "ml-1m-hstu", "original"), seed, draw, **own)
        write_trial(out / f"trials/h{seed}", ("recipes", "ml-1m-hstu", "honest"), seed, draw, finished=seed == 0, **own)
        write_trial(out / f"trials/p{seed}", (CHOICES.name, "hstu_retrieval", "as published"), seed, draw, **own)
    write_trial(out / "trials/f", (CHOICES.name, "hstu_retrieval", "full softmax"), 1, draw, **own)
    return out


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def watched(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:-1]
    return [record for line in lines if "loss" not in (record := json.loads(line))]


def test_the_table_holds_means_and_spreads_of_what_was_recorded(runs: Path) -> None:
    recipe_table, choices = tables(read_runs([runs]))
    rows = {row[1]: row for row in recipe_table.rows}
    assert set(rows) == {"original, last", "original, best on test", "honest"}  # other data: nothing published
    tested = [result(runs / f"trials/o{seed}")["hr@10"] for seed in (0, 1)]
    spread = f"{statistics.mean(tested):.4f} ± {math.sqrt((tested[0] - tested[1]) ** 2 / 2):.4f}"
    assert rows["original, last"][:5] == ("HSTU", "original, last", "3, 3", "2", spread)
    best = [max(watched(runs / f"trials/o{seed}"), key=lambda r: r["test/ndcg@10"]) for seed in (0, 1)]
    assert rows["original, best on test"][2] == ", ".join(str(r["step"] // 2) for r in best)
    assert rows["original, best on test"][4].startswith(f"{statistics.mean(r['test/hr@10'] for r in best):.4f} ±")
    assert rows["honest"][2:5] == ("2", "1", f"{result(runs / 'trials/h0')['hr@10']:.4f}")
    assert "Still at work: ml-1m-hstu honest seed 1." in recipe_table.intro
    (reference, full) = choices.rows
    assert reference[:2] == ("as published", "2")
    assert full[:2] == ("full softmax", "1")
    difference = result(runs / "trials/f")["hr@10"] - result(runs / "trials/p1")["hr@10"]  # the same seed
    assert full[6] == f"{difference:+.4f}"
    assert full[8] == "1.00"


def test_the_page_holds_tables_and_curves(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs/retrieval.md"
    main(["results", str(runs), "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    for table in tables(read_runs([runs])):
        assert table.markdown() in text
    (figure,) = page.parent.glob("*.svg")
    assert f"]({figure.name})" in text
    drawn = figure.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    assert ">published<" not in drawn
    assert len([run for run in read_runs([runs]) if run.curve]) == 7
    before = drawn
    main(["results", str(runs), "--out", str(page)])
    assert figure.read_text(encoding="utf-8") == before


def test_records_stand_in_for_folders_that_are_gone(runs: Path, tmp_path: Path) -> None:
    """A page of records and of a folder is the page of both folders, and its records are all finished trials."""
    first, second = tmp_path / "first/trials", tmp_path / "second"
    whole, kept, both = tmp_path / "whole.md", tmp_path / "kept.md", tmp_path / "both.md"
    main(["results", str(runs), "--out", str(whole)])
    shutil.copytree(runs, second)
    first.mkdir(parents=True)
    for name in ("o0", "p0", "h0"):
        (second / "trials" / name).rename(first / name)
    shutil.copy(runs / "datasets.json", first.parent)
    main(["results", str(first.parent), "--out", str(kept)])
    shutil.rmtree(first)
    main(["results", str(kept.with_suffix(".jsonl")), str(second), "--out", str(both)])
    assert both.read_text(encoding="utf-8").replace("both", "whole") == whole.read_text(encoding="utf-8")
    assert "\n- 6 trials on abacus, 2026-01-01 to 2026-01-02: 0.0 h of training steps; jax 1.2\n" in whole.read_text()
    records = both.with_suffix(".jsonl").read_bytes()
    assert records == whole.with_suffix(".jsonl").read_bytes()
    assert len(records.splitlines()) == 6  # what is still at work is not kept
    main(["results", str(both.with_suffix(".jsonl")), "--out", str(both)])
    assert both.with_suffix(".jsonl").read_bytes() == records


def test_a_trial_run_again_takes_the_place_of_its_record(runs: Path, tmp_path: Path) -> None:
    """Under another hash, as after a change of the configuration's keys; an unfinished one takes no place."""
    page = tmp_path / "page.md"
    main(["results", str(runs), "--out", str(page)])
    again = tmp_path / "again"
    again.mkdir()
    write_datasets(again, load(tmp_path / "d"))
    own = {"digest": load(tmp_path / "d").digest}
    for name, seed, finished in (("x", 0, True), ("y", 1, False)):
        place = ("recipes", "ml-1m-hstu", "original")
        write_trial(again / f"trials/{name}", place, seed, np.random.default_rng(9), finished=finished, **own)
    found = {run.trial: run for run in read_runs([page.with_suffix(".jsonl"), again]) if run.label == "original"}
    assert set(found) == {"x", "o1"}
    assert found["x"].tested["hr@10"] == result(again / "trials/x")["hr@10"]


def test_a_file_without_records_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "[1]\n", '{"curve": {}}\n', '{"study": "recipes"}\n'):
        (tmp_path / "r.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match="2"):
            main(["results", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "page.md")])
        said = capsys.readouterr().err
        assert said == f"error: {tmp_path}/r.jsonl does not hold records of runs, as `genrec results` writes them\n"
    assert not (tmp_path / "page.md").exists()


def test_published_numbers_stand_beside_the_published_data(runs: Path) -> None:
    (digest,) = json.loads((runs / "datasets.json").read_text(encoding="utf-8"))
    entry = {"name": "ml-1m", "users": 6040, "items": 3883}
    (runs / "datasets.json").write_text(json.dumps({digest: entry}), encoding="utf-8")
    first = tables(read_runs([runs]))[0].rows[0]
    assert first[:5] == ("HSTU", "published", "unknown", "", "0.3097")
    assert first[-2:] == ("0.2606", "")


def test_choices_differ_from_the_reference_in_what_they_name() -> None:
    planned = CHOICES.trials("", "small")
    assert len(planned) == 24
    by_label = {one.label: one.trial for one in planned if one.trial.seed == 0}
    reference = by_label["as published"]
    assert reference == recipes.read("ml-1m-hstu").trial("honest", 0, 20)
    flat = {label: flatten(trial.to_json(), ".") for label, trial in by_label.items()}
    changed = {
        label: {key for key in values if values[key] != flat["as published"][key]} for label, values in flat.items()
    }
    assert changed == {
        "as published": set(),
        "shared negatives": {"model.shared_negatives"},
        "shared negatives, 1,024": {"model.shared_negatives", "model.negatives"},
        "popular negatives": {"model.sampling"},
        "popular negatives, logQ": {"model.sampling", "model.logq"},
        "full softmax": {"model.negatives"},
        "true length": {"model.true_length"},
        "no next time": {"model.next_time"},
    }


def test_shuffled_ties_move_within_their_second_only(tmp_path: Path) -> None:
    times = [[0] * 30 + [1, 2, 2, 2] + [3] * 5, [5, 5, 6], [], [7]]
    original = dataset(tmp_path / "d", times)  # event e shows item e + 1
    made = shuffle_ties(original, tmp_path / "a", 0)
    user = owner(original)

    def groups(sequences: Sequences) -> list[tuple[int, ...]]:
        return sorted(zip(user.tolist(), sequences.time.tolist(), sequences.item.tolist(), strict=True))

    np.testing.assert_array_equal(made.offsets, original.offsets)
    np.testing.assert_array_equal(made.time, original.time)
    assert groups(made) == groups(original)
    event = np.asarray(made.item) - 1  # what belongs to an event goes with it
    np.testing.assert_array_equal(made.labels, np.asarray(original.labels)[event])
    np.testing.assert_array_equal(made.features["device"], np.asarray(original.features["device"])[event])
    np.testing.assert_array_equal(made.features["genres"], original.features["genres"])
    assert (event[:30] != np.arange(30)).sum() > 20
    assert made.item[30] == 31
    assert (shuffle_ties(original, tmp_path / "b", 1).item != made.item).any()
    assert made.name == "tiny, ties shuffled"
    with pytest.raises(UserError, match="has requests"):
        shuffle_ties(dataset(tmp_path / "r", [[0, 0]], [[1, 1]]), tmp_path / "c", 0)
