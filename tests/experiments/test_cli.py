"""The command line: every mistake of a user's is one sentence on stderr, exit code 2, and nothing half-written."""

import json
import re
import signal
from pathlib import Path

import polars as pl
import pytest

from experiments.cli import main
from experiments.run import Rules, studies
from genrec_jax.data.sequences import load
from genrec_jax.data.synthetic import read_world


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


def test_a_coefficient_that_no_number_holds_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the least of four sizes is worse: a steep term, whose value at N = 1 is beyond 1e308."""
    table, found = tmp_path / "table.csv", tmp_path / "law.json"
    sizes = [(n * 7e20, d) for n in (1, 2, 4, 8) for d in (1e5, 3e5, 1e6, 3e6)]
    rows = [f"{n:g},{d:g},{0.5 + 30 * d**-0.3 + 0.02 * (n < 1e21)}" for n, d in sizes]
    table.write_text("n,d,loss\n" + "\n".join(rows) + "\n", encoding="utf-8")
    columns = ["--law", "chinchilla", "--n", "n", "--d", "d", "--y", "loss"]
    main(["fit", str(table), *columns, "--draws", "40", "--json", str(found)])
    assert re.search(r" A unbounded +\S+ to unbounded\n", capsys.readouterr().out)
    assert json.loads(found.read_text(encoding="utf-8"))["params"]["A"] is None


def test_only_the_trials_asked_for_are_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    world = tmp_path / "world"
    main(["data", "synthetic", "--preset", "tiny", "--events", "7000", "--out", str(world), "--quiet"])
    capsys.readouterr()
    given = ["sweep", "history_vs_depth", "--data", str(world), "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        main([*given, "--only", "depth=1,depth=8", "--only", "history=32", "--only", "fraction=1,fraction=0.5"])
    assert stop.value.code == 0
    planned = re.findall(r"(hstu .*?seed=0) ", capsys.readouterr().out)
    assert planned == [
        f"hstu depth={depth} history=32 fraction={share} seed=0" for depth in (1, 8) for share in ("0.5", "1")
    ]
    assert "--only depth=3: no trial has this in its name; there is: depth=1," in fails(
        capsys, *given, "--only", "depth=1,depth=3"
    )
    assert "no trial has depth=1 and depth=2 in its name" in fails(
        capsys, *given, "--only", "depth=1", "--only", "depth=2"
    )
    rules = Rules(only=("depth=1,depth=2", "hstu"))
    said = "genrec sweep history_vs_depth --data log --budget small --only depth=1,depth=2 --only hstu"
    assert rules.command("history_vs_depth", Path("log"), "small") == said


def test_recommend_says_what_a_budget_buys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5 C^-0.1 at 1e14; a budget that is none is one sentence and writes nothing."""
    table, found = tmp_path / "table.csv", tmp_path / "advice.json"
    rows = [f"dlrm,{c:g},{5 * c**-0.1:.8f},done,{i}" for i, c in enumerate([1e9, 1e10, 1e11, 1e12, 1e13])]
    table.write_text("family,train_flops,ne,status,trial\n" + "\n".join(rows) + "\n", encoding="utf-8")
    for budget in ("0", "-1e12", "nan"):
        assert "positive number of FLOPs" in fails(capsys, "recommend", table, "--budget", budget, "--json", found)
        assert not found.exists()
    main(["recommend", str(table), "--budget", "1e14", "--json", str(found)])
    (advice,) = json.loads(found.read_text(encoding="utf-8"))["advice"]
    assert advice["metric"]["value"] == pytest.approx(5 * 10**-1.4, rel=1e-4)
    assert f"expected  {advice['metric']['value']:.5g}" in capsys.readouterr().out


RAN = "<p><code>genrec sweep depth</code></p>"


def test_report_of_a_folder_of_studies(tmp_path: Path) -> None:
    """Each study opens its own section with its question; two folders of one study are pooled and named."""
    header = "study,dataset,family,train_flops,ne,status,trial\n"
    for place, study in (("a", "depth"), ("b", "width"), ("c", "width")):
        folder = tmp_path / "runs" / place
        folder.mkdir(parents=True)
        rows = [
            f"{study},w,dlrm,{c:g},{0.7 + 2 * c**-0.1:.6f},done,{place}{c:g}" for c in (1e9, 1e10, 1e11, 1e12, 1e13)
        ]
        (folder / "results.csv").write_text(header + "\n".join(rows) + "\n", encoding="utf-8")
        heading = {
            "title": study,
            "summary": f"What of {study}?",
            "metric": "ne",
            "commands": [f"genrec sweep {study}"],
        }
        (folder / "study.json").write_text(json.dumps(heading), encoding="utf-8")
        (folder / "notes.json").write_text(json.dumps({"w": ["Made up."]}), encoding="utf-8")
    main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for said in ("depth · w", "width · w", "<p>What of depth?</p>", "<p>What of width?</p>", "<dd>Made up.</dd>", RAN):
        assert page.count(said) == 1 or "·" in said, said
    assert "The trials of these folders on w are pooled: b, c." in page


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
        (["data", "import", log, "--label", "a=b", "--mapping", log, "--out", out], "--label"),
        (["data", "import", log, "--time-unit", "s", "--mapping", log, "--out", out], "--time-unit"),
        (["data", "import", log, "--promise-sorted", "--mapping", log, "--out", out], "--promise-sorted"),
        (["data", "import", log, *COLUMNS, "--order", "absent", "--out", out], "absent"),
        (["data", "synthetic", "--preset", "nope", "--out", out], "nope"),
        (["data", "synthetic", "--set", "users", "--out", out], "key=value"),
        (["data", "synthetic", "--set", "nope=1", "--out", out], "nope"),
        (["data", "synthetic", "--set", "users=many", "--out", out], "users=many"),
        (["data", "synthetic", "--set", "noise=nan", "--out", out], "noise"),
        (["data", "synthetic", "--set", "base=1,x,2", "--out", out], "base=1,x,2"),
        (["data", "synthetic", "--set", "users=0", "--out", out], "users"),
        (["data", "synthetic", "--events", "0", "--out", out], "--events"),
        (["data", "synthetic", "--events", "9", "--set", "users=3", "--out", out], "give one of the two"),
        (["data", "synthetic", "--preset", "tiny", "--workers", "0", "--out", out], "0 workers"),
        (["data", "import", log, *COLUMNS, "--memory-mib", "0", "--out", out], "--memory-mib"),
        (["data", "import", log, *COLUMNS, "--workers", "-1", "--out", out], "-1 workers"),
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


def test_flags_for_a_known_dataset_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its columns are known, so a flag would be ignored without a word."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "u.data").write_text("1\t1\t5\t10\n", encoding="utf-8")
    (raw / "u.item").write_text("1|One|x||url" + "|0" * 19 + "\n", encoding="latin-1")
    (raw / "ratings.dat").write_text("1::1::5::10\n", encoding="utf-8")
    (raw / "movies.dat").write_text("1::One::Drama\n", encoding="utf-8")
    (raw / "users.dat").write_text("1::F::1::10::48067\n", encoding="utf-8")
    for flags in (
        ["--label", "like=3>=4"],
        ["--request", "1"],
        ["--order", "1"],
        ["--time-unit", "ms"],
        ["--user-feature", "a=b"],
        ["--item-feature", "a=b"],
        ["--event-feature", "a=b"],
        ["--promise-sorted"],
        ["--user", "1"],
        ["--mapping", "some.toml"],
    ):
        said = fails(capsys, "data", "import", raw, *flags, "--out", out)
        assert flags[0] in said
        assert "known" in said
        assert not out.exists()


def test_order_breaks_ties_of_time(tmp_path: Path) -> None:
    log, out = tmp_path / "log.csv", tmp_path / "out"
    log.write_text("u,i,t,n\n1,b,5,2\n1,a,5,1\n", encoding="utf-8")
    columns = ["--user", "u", "--item", "i", "--time", "t", "--order", "n"]
    main(["data", "import", str(log), *columns, "--out", str(out), "--quiet"])
    assert load(out).item.tolist() == [2, 1]


def test_any_size_of_a_world_can_be_set(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    given = ["requests=3", "items=50", "noise=0.25", "tasks=click, buy", "base=-1,0.5"]
    flags = ["--events", "350", *(part for setting in given for part in ("--set", setting))]  # 30 users of 12 each
    main(["data", "synthetic", "--preset", "tiny", "--seed", "7", *flags, "--out", str(out), "--quiet"])
    data, world = load(out), read_world(out)
    assert (data.name, data.users, data.schema.tasks) == ("mine", 30, ("click", "buy"))
    assert (world.noise, world.base, world.seed) == (0.25, (-1.0, 0.5), 7)


def test_every_study_resolves_at_every_budget() -> None:
    """Unknown keys, clashing factors and impossible sizes would be refused here."""
    known = studies()
    names = {"depth", "width", "data", "history", "gr_vs_dlrm", "ml1m_retrieval", "quickstart", "tuning"}
    names |= {"retrieval_choices", "generative", "generative_tuning", "stochastic_length", "rate_check", "epochs"}
    names |= {"lr_transfer", "lr_depth", "lr_batch", "parametrisations", "history_vs_depth", "history_rates"}
    assert set(known) == names
    for study in known.values():
        for budget in study.points:
            assert study.trials("somewhere", budget)


def test_a_setting_of_a_sweep_reaches_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = tmp_path / "world"
    main(["data", "synthetic", "--preset", "tiny", "--events", "7000", "--out", str(world), "--quiet"])
    capsys.readouterr()
    given = ["sweep", "quickstart", "--data", str(world), "--dry-run", "--set"]
    plans = {}
    for fraction in ("1.0", "0.5"):
        with pytest.raises(SystemExit) as stop:
            main([*given, f"data.fraction={fraction}"])
        assert stop.value.code == 0
        plans[fraction] = re.findall(r"seed=0 +(\S+) ", capsys.readouterr().out)
    assert plans["1.0"]
    assert all(float(half) < float(whole) for half, whole in zip(plans["0.5"], plans["1.0"], strict=True))
    assert "is named by --data" in fails(capsys, *given, "data.path=elsewhere")
    assert "set it themselves" in fails(capsys, *given, "model.width=8")


def test_a_page_names_the_command_without_the_places_of_this_machine() -> None:
    rules = Rules("mine/steep.toml", {"data.test": "0.03"})
    said = "genrec sweep gr_vs_dlrm --data log --budget medium --ladder steep.toml --set data.test=0.03"
    assert rules.command("gr_vs_dlrm", Path("/somewhere/log"), "medium") == said
    assert Rules().command("depth", Path("a b"), "small") == "genrec sweep depth --data 'a b' --budget small"
    assert studies()["gr_vs_dlrm"].question.startswith("GR against DLRM")
    assert not [name for name, study in studies().items() if "\n    python -m" in study.question]
    assert "\n    NE = E + A P^-alpha + B D^-beta + G N^-gamma\n" in studies()["history_vs_depth"].question


def test_the_search_for_studies_leaves_signals_alone() -> None:
    """It imports modules; were one to block SIGTERM, whoever searched would be deaf to it ever after."""
    studies()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_comparison_has_the_promised_points() -> None:
    planned = studies()["gr_vs_dlrm"].trials("somewhere", "small")
    by_family: dict[str, list[tuple[str, int]]] = {}
    for one in planned:
        by_family.setdefault(one.family, []).append((one.label, one.trial.seed))
    assert set(by_family) == {"hstu", "dirl", "transformer", "dlrm", "dcn"}
    for places in by_family.values():
        assert len({label for label, _ in places}) >= 5
        assert len({label for label, seed in places if seed == 1}) >= 2
