"""The command line: every mistake of a user's is one sentence on stderr, exit code 2, and nothing half-written."""

import json
from pathlib import Path

import polars as pl
import pytest

from experiments.cli import main
from experiments.run import studies


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Ten users with twelve events each, one label."""
    rows = [(u, (7 * u + 3 * e) % 23, 1000 * e + u, (u + e) % 2) for u in range(10) for e in range(12)]
    path = tmp_path / "log.csv"
    pl.DataFrame(rows, schema=["who", "what", "when", "clicked"], orient="row").write_csv(path)
    return path


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Runs the command, which must fail with exit code 2 and one line on stderr; returns that line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "Traceback" not in said
    return said


COLUMNS = ["--user", "who", "--item", "what", "--time", "when"]


def test_import_show_train_fit_report(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's own log, from CSV to a page, by the commands of the README."""
    data, run = tmp_path / "data", tmp_path / "run"
    main(["data", "import", str(log), *COLUMNS, "--label", "click=clicked", "--out", str(data), "--quiet"])
    assert "120" in capsys.readouterr().out
    settings = ["data.history=4", "data.candidates=2", "train.batch_rows=4", "train.steps=3", "model.width=8"]
    flags = [part for setting in settings for part in ("--set", setting)]
    main(["train", "--data", str(data), "--model", "dlrm", *flags, "--out", str(run), "--quiet"])
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "done"
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["model"]["width"] == 8

    table = tmp_path / "table.csv"
    rows = [f"dlrm,{c:g},{0.7 + 2 * c**-0.1:.6f},done,{i}" for i, c in enumerate([1e9, 1e10, 1e11, 1e12, 1e13])]
    table.write_text("family,train_flops,ne,status,trial\n" + "\n".join(rows) + "\n", encoding="utf-8")
    main(["fit", str(table), "--json", str(tmp_path / "fit.json")])
    assert "dlrm" in capsys.readouterr().out
    assert "dlrm" in (tmp_path / "fit.json").read_text(encoding="utf-8")
    main(["report", str(table), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")


BAD_TRAIN = [
    (["--set", "model.nonsense=1"], "model.nonsense"),
    (["--set", "nonsense"], "nonsense"),
    (["--set", "data.history=-3"], "data.history"),
    (["--set", "train.epochs=-1"], "train.epochs"),
    (["--set", "train.steps=-1"], "train.steps"),
    (["--set", "train.steps=many"], "train.steps"),
    (["--model", "nope"], "nope"),
    (["--set", "model.width=0"], "model.width"),
]


@pytest.mark.parametrize(("extra", "named"), BAD_TRAIN)
def test_bad_trial_is_refused(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], named: str
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    main(["data", "import", str(log), *COLUMNS, "--label", "click=clicked", "--out", str(data), "--quiet"])
    capsys.readouterr()
    model = [] if "--model" in extra else ["--model", "hstu"]
    assert named in fails(capsys, "train", "--data", data, *model, *extra, "--out", run)
    assert not run.exists()


def test_bad_commands_are_one_sentence(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, out = tmp_path / "missing", tmp_path / "out"
    cases: list[tuple[list[object], str]] = [
        ([], "subcommand"),
        (["nonsense"], "nonsense"),
        (["data", "import", log, "--out", out], "--user"),
        (["data", "import", log, *COLUMNS, "--label", "click=absent", "--out", out], "absent"),
        (["data", "import", missing, *COLUMNS, "--out", out], "missing"),
        (["data", "import", log, *COLUMNS, "--mapping", log, "--out", out], "--mapping"),
        (["data", "synthetic", "--preset", "nope", "--out", out], "nope"),
        (["data", "show", missing], "missing"),
        (["train", "--data", missing, "--model", "dlrm", "--out", out], "missing"),
        (["train", "--data", log.parent, "--model", "dlrm", "--out", out], "neither"),
        (["sweep", "nope", "--data", log], "nope"),
        (["sweep", "depth", "--data", log, "--budget", "tiny"], "budget"),
        (["sweep", "depth", "--data", missing], "missing"),
        (["fit", missing], "missing"),
        (["report", missing, "--out", out], "missing"),
        (["bench", "nope"], "nope"),
        (["train", "--model", "dlrm", "--out", out], "--data"),
        (["data", "synthetic", "--preset", "tiny", "--out", log / "below-a-file"], "log.csv"),
    ]
    for args, named in cases:
        assert named in fails(capsys, *args), args
        assert not out.exists(), args


def test_every_study_resolves_at_every_budget() -> None:
    """Unknown keys, clashing factors and impossible sizes would be refused here."""
    known = studies()
    names = {"depth", "width", "data", "history", "gr_vs_dlrm", "ml1m_retrieval", "quickstart"}
    assert set(known) == names
    for study in known.values():
        for budget in study.points:
            assert study.trials("somewhere", budget)


def test_comparison_has_the_promised_points() -> None:
    planned = studies()["gr_vs_dlrm"].trials("somewhere", "small")
    by_family: dict[str, list[tuple[str, int]]] = {}
    for one in planned:
        by_family.setdefault(one.family, []).append((one.label, one.trial.seed))
    assert set(by_family) == {"hstu", "dirl", "transformer", "dlrm", "dcn"}
    for places in by_family.values():
        assert len({label for label, _ in places}) >= 5
        assert len({label for label, seed in places if seed == 1}) >= 2
