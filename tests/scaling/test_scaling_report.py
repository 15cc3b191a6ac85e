"""Analysis, commands, figures and the report page, on a small made-up study."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scaling import Reference, Table, TableError, analyse, fit_command, read_table, report_command, write_report
from scaling.metrics import default_metric, higher_is_better
from scaling.plots import law_figure, ratio_figure
from scaling.style import equation, family_styles, number, tick

HOSTILE = "<script>alert(1)</script>"
BAYES = Reference("Bayes NE", 0.60, 0.59, 0.61)
LAWS = {"hstu": (0.60, 0.30, 0.20, 1e12, 1e16), "dlrm": (0.75, 0.12, 0.25, 1e11, 1e15)}


def trial_rows() -> list[dict[str, object]]:
    rng = np.random.default_rng(5)
    rows: list[dict[str, object]] = []

    def add(family: str, label: str, seed: int, axis: str, value: float, flops: float, ne: float) -> None:
        row = {"trial": f"t{len(rows)}", "study": "gr", "dataset": "world", "family": family, "label": label}
        row |= {"seed": seed, "status": "done", "axis": axis, "axis_value": value, "train_flops": flops}
        row |= {"epochs": 1, "flops_formula": "v1", "eval_set": "abc", "ne": ne, "ne/click": ne + 0.01}
        rows.append({**row, "auc": 1.2 - ne, "base_rate/click": 0.1, "learning_rate": 3e-4})

    for family, (c, a, b, low, high) in LAWS.items():
        for i, flops in enumerate(np.geomspace(low, high, 6)):
            for seed in range(2):
                ne = c + a * (flops / 1e12) ** -b + rng.normal(0, 5e-4)
                add(family, f"s{i}", seed, "compute", flops, flops, ne)
    for depth in (1, 2, 4, 8):
        add("hstu", f"d{depth}", 0, "depth", depth, 1e13 * depth, 0.80 - 0.01 * np.log(depth))
    bad = {**rows[0], "trial": "bad", "label": HOSTILE, "status": "diverged", "ne": "", "auc": "", "ne/click": "nan"}
    return [*rows, bad]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "results.csv"
    rows = trial_rows()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def page(results: Path) -> str:
    out = results.parent / "out" / "report.html"
    report_command(
        results.parent,
        out,
        title="A & B",
        summary="First.\n\nSecond <b>.",
        references=[BAYES],
        n_boot=100,
        assets_dir=out.parent / "assets",
    )
    return out.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Checks that every element closes in order and collects ids, rows and network addresses."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"href", "src", "xlink:href"}:
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_is_well_formed_and_needs_no_network(page: str) -> None:
    parser = Balance()
    parser.feed(page)
    assert parser.stack == []
    assert len(parser.ids) == len(set(parser.ids))
    assert all(link.startswith(("#", "data:")) for link in parser.links)
    assert parser.count["svg"] >= 6
    assert 'name="viewport"' in page
    for link in parser.links:
        assert not link.startswith("#") or link[1:] in parser.ids


def test_page_shows_every_trial_and_escapes_what_it_shows(page: str) -> None:
    trials = page[page.index('id="trials"') :]
    shown = re.findall(r"<td>(t\d+|bad)</td>", trials)
    assert sorted(shown) == sorted(str(row["trial"]) for row in trial_rows())
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Second &lt;b&gt;." in page
    assert "<title>A &amp; B</title>" in page
    assert '<tr class="bad">' in trials


def test_page_says_what_a_reader_needs(page: str) -> None:
    assert len(re.findall(r"<dt>\d+\. ", page)) == 12
    assert "not recorded" in page
    assert "excluded_trials" in page
    assert "1 diverged" in page
    assert "consistent: the intervals overlap" in page  # hstu's constant against the Bayes NE
    assert "above the known value" in page  # dlrm's plateau
    assert "hstu against dlrm" in page
    assert "aria-sort" in page


def test_assets_hold_the_same_figures(page: str, results: Path) -> None:
    assets = results.parent / "out" / "assets"
    names = sorted(path.name for path in assets.iterdir())
    assert "gr-world-ne-train-flops-law.svg" in names
    assert "gr-world-ne-depth-law.csv" in names
    assert {"trials.csv", "laws.tex", "gr-world-ne-train-flops-law.pdf"} <= set(names)
    assert "gr-world-auc-train-flops-law.svg" in names
    assert "gr-world-auc-train-flops-law.pdf" not in names  # a small figure is no figure of a paper
    svg = (assets / "gr-world-ne-train-flops-law.svg").read_text(encoding="utf-8")
    assert "training compute C (FLOPs)" in svg  # text stays text
    with (assets / "gr-world-ne-train-flops-law.csv").open(encoding="utf-8") as file:
        kinds = {row["kind"] for row in csv.DictReader(file)}
    assert kinds == {"run", "mean", "curve", "extrapolation", "reference"}


def test_same_table_same_bytes(results: Path, tmp_path: Path) -> None:
    table = read_table(results)
    table = table.where(np.array([axis == "compute" for axis in table.text("axis")]))
    for name in ("a", "b"):
        out = tmp_path / name / "page.html"
        write_report(table, out, title="t", n_boot=50, references=[BAYES], assets_dir=out.parent)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"laws.tex", "page.html", "gr-world-ne-train-flops-residuals.pdf"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"<dc:date>" not in (tmp_path / "a" / "page.html").read_bytes()


def test_fit_command_recovers_the_laws_and_writes_strict_json(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "fit.json"
    returned = fit_command([results], "ne", "train_flops", "family", out)
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(returned, allow_nan=False))
    compute, depth = json.loads(out.read_text(encoding="utf-8"))["panels"]
    assert (compute["axis"], depth["axis"]) == (None, "depth")
    dlrm = next(f for f in compute["families"] if f["name"] == "dlrm")
    assert dlrm["fits"]["power_const"]["params"]["c"] == pytest.approx(0.75, abs=0.01)
    low, high = dlrm["fits"]["power_const"]["intervals"]["c"]
    assert low < 0.75 < high
    assert dlrm["configurations"] == 6
    assert dlrm["runs"] == 12
    assert dlrm["bootstrap"].startswith("bootstrap of normal residuals")
    assert set(dlrm["fits"]) == {"loglin", "power", "power_const"}
    assert compute["comparisons"][0]["base"] == "dlrm"
    hstu = next(f for f in compute["families"] if f["name"] == "hstu")
    assert "excluded_trials" in {w["code"] for w in hstu["warnings"]}


def test_predictions_carry_both_intervals_and_warn_when_far(results: Path) -> None:
    analysis = analyse(read_table(results), "ne", predict_at=[1e18], n_boot=1000, axes=False)
    family = next(f for f in analysis.panels[0].families if f.name == "hstu")
    (prediction,) = family.predictions
    assert prediction.extrapolation == pytest.approx(100)
    assert prediction.curve is not None
    assert prediction.one_run is not None
    assert prediction.one_run[0] < prediction.curve[0] < prediction.curve[1] < prediction.one_run[1]
    assert "far_extrapolation" in {w.code for w in family.warnings}


def test_mixed_records_are_warned_about(results: Path) -> None:
    table = read_table(results)
    table.rows[0] = {**table.rows[0], "flops_formula": "v2", "eval_set": "xyz", "epochs": "3"}
    analysis = analyse(table, "ne", n_boot=50, axes=False)
    codes = {w.code for w in analysis.panels[0].families[0].warnings}
    assert {"mixed_flops_formula", "mixed_eval_set", "repeated_data"} <= codes


def test_seeds_of_one_configuration_are_one_point_and_designs_are_not_mixed(results: Path) -> None:
    table = read_table(results)
    analysis = analyse(table, "ne", n_boot=50, axes=False)
    dlrm = next(f for f in analysis.panels[0].families if f.name == "dlrm")
    assert [len(run) for run in dlrm.points.runs] == [2] * 6
    other = next(i for i, row in enumerate(table.rows) if row["family"] == "dlrm")
    table.rows[other] = {**table.rows[other], "learning_rate": "1e-2"}
    again = analyse(table, "ne", n_boot=50, axes=False)
    assert len(next(f for f in again.panels[0].families if f.name == "dlrm").points) == 7


def test_frontier_fits_only_the_envelope(results: Path) -> None:
    full = analyse(read_table(results), "ne", n_boot=50, axes=False).panels[0].families[0]
    front = analyse(read_table(results), "ne", n_boot=50, axes=False, frontier=True).panels[0].families[0]
    assert len(front.points) < len(full.points)
    assert np.all(np.diff(front.points.mean) < 0)


def test_refusals_are_one_sentence(results: Path, tmp_path: Path) -> None:
    table = read_table(results)
    with pytest.raises(TableError, match="'gauc' is missing"):
        analyse(table, "gauc")
    with pytest.raises(TableError, match="family = 'bert3'"):
        analyse(table, "ne", base="bert3")
    with pytest.raises(ValueError, match="unknown form"):
        analyse(table, "ne", form="cubic")
    nothing = table.where(np.array([status == "diverged" for status in table.text("status")]))
    with pytest.raises(TableError, match=r"results\.csv: no finished trial has both 'train_flops' and 'ne'"):
        analyse(nothing, "ne")
    with pytest.raises(TableError):
        write_report(nothing, tmp_path / "never.html", title="t", metric="ne")
    assert list(tmp_path.iterdir()) == []


def test_two_points_draw_without_a_law(results: Path, tmp_path: Path) -> None:
    """A table too small for any law still gets its page, and says why there is no curve; a form asked for is tried."""
    table = read_table(results)
    few = table.where(np.arange(len(table)) == 0)
    analysis = write_report(few, tmp_path / "small.html", title="small", n_boot=50)
    assert analysis.panels[0].families[0].chosen is None
    page = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert "A plain comparison: no family has 4 distinct x" in page
    assert page.count("No law was fitted.") == 5
    write_report(few, tmp_path / "asked.html", title="asked", form="power", n_boot=50)
    assert "no_fit" in (tmp_path / "asked.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "values",
    [[0.7] * 6, [0.0] * 6, [0.9, 0.5, 0.5, 0.5, 0.5, 0.5], [0.9] * 5 + [0.5], [-3, -2, -1, 0, 1, 2], [0.5, 0.6]],
    ids=["flat", "zero", "first step", "last step", "through zero", "two points"],
)
@pytest.mark.parametrize("metric", ["ne", "auc"])
def test_awkward_curves_fit_and_draw_without_a_warning(values: list[float], metric: str) -> None:
    """Shapes with no law in them, at a huge x: numbers or None come out, never an overflow or a crash."""
    rows = []
    for name, shift in (("a", 0.0), ("b", 0.01)):
        for i, value in enumerate(values):
            rows.append({"family": name, "train_flops": repr(10.0 ** (30 + i)), metric: repr(value + shift * (i % 2))})
    analysis = analyse(Table(list(rows[0]), rows, ["x.csv, line 2"] * len(rows)), metric, n_boot=30)
    json.dumps(analysis.to_json(), allow_nan=False)
    assert law_figure(analysis.panels[0]).svg.startswith("<?xml")


def test_a_ratio_without_an_end_is_drawn_off_the_axis() -> None:
    """Where a part of the draws has the base end above a quality, the band has no upper end; the axis does."""
    measured = {
        "dlrm": [0.8330, 0.8225, 0.8180, 0.8159, 0.8109, 0.8125, 0.8086, 0.8085],
        "dirl": [0.8983, 0.8542, 0.8125, 0.8045, 0.7857, 0.7817, 0.7828, 0.7739],
    }
    rows = [
        {"family": family, "train_flops": repr(2e10 * 2.85**i), "ne": repr(ne)}
        for family, values in measured.items()
        for i, ne in enumerate(values)
    ]
    analysis = analyse(Table(list(rows[0]), rows, ["x.csv, line 2"] * len(rows)), "ne", n_boot=200)
    (comparison,) = analysis.panels[0].comparisons
    assert np.isinf(comparison.ratio.high).any()
    assert np.isfinite(comparison.ratio.high).any()
    plot = ratio_figure(analysis.panels[0])
    assert plot is not None
    bottom, top = plot.figure.axes[0].get_ylim()
    assert 1e-3 < bottom < top < 1e5


def test_metric_direction_and_default() -> None:
    assert [higher_is_better(m) for m in ("ne", "ne/click", "logloss", "auc", "gauc/one", "hr@10", "ndcg@10")] == [
        False,
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    table = analyse_table("hr@10")
    assert default_metric(table) == "hr@10"
    assert analyse(table, n_boot=50).rising
    for metric in ("validation/ne", "validation/hr@10"):  # nothing of the test part: a tuning study
        assert default_metric(analyse_table(metric)) == metric
        assert analyse(analyse_table(metric), n_boot=50).metric == metric


def analyse_table(metric: str) -> Table:
    x = np.geomspace(1e12, 1e15, 5)
    rows = [{"family": "a", "train_flops": repr(float(v)), metric: repr(float(0.1 + 0.02 * np.log(v)))} for v in x]
    return Table(["family", "train_flops", metric], rows, [f"m.csv, line {i}" for i in range(5)])


def test_a_missing_study_and_seed_column_still_fits() -> None:
    analysis = analyse(analyse_table("hr@10"), n_boot=50)
    fit = analysis.panels[0].families[0].fit
    assert fit is not None
    assert fit.form == "loglin"
    assert fit.params["b"] == pytest.approx(0.02)
    plot = law_figure(analysis.panels[0])
    assert "HR@10 = 0.10000 + 0.020000·ln C" in plot.alt


def test_reading_numbers() -> None:
    assert number(477.8259) == "477.83"
    assert number(0.5) == "0.50000"
    assert number(-2143417.4) == "−2.1434×10⁶"
    assert number(float("inf")) == "∞"
    assert (number(289310.0), number(99.7, 2), number(0.0)) == ("2.8931×10⁵", "1.0×10²", "0.0000")
    assert (tick(1e18), tick(2e-7), tick(64)) == ("10¹⁸", "2×10⁻⁷", "64")
    assert equation("power_const", {"c": 0.6, "a": -3.0, "b": 0.2}, "AUC", "C") == "AUC = 0.60000 − 3.0000·C^−0.20000"


def test_a_family_looks_the_same_on_every_page_and_has_a_second_cue() -> None:
    styles = family_styles(["mine", "dirl", "dlrm", "hstu", "theirs"])
    assert styles["dlrm"].colour == "#D55E00"
    assert styles["hstu"].colour == "#0072B2"
    for cue in ("colour", "marker", "line"):
        assert len({str(getattr(style, cue)) for style in styles.values()}) == 5
    alone = family_styles(["HSTU"]) | family_styles(["dlrm", "dirl"]) | family_styles(["x", "dcn_v2"])
    assert (alone["HSTU"], alone["dlrm"], alone["dirl"]) == (styles["hstu"], styles["dlrm"], styles["dirl"])
    assert alone["dcn_v2"] == family_styles(["dcn"])["dcn"]
    assert alone["x"] not in (alone["dcn_v2"], styles["hstu"], styles["dlrm"])
    twice = family_styles(["dcn", "dcn_v2"])
    assert twice["dcn"].colour != twice["dcn_v2"].colour
    assert len(family_styles([str(i) for i in range(20)])) == 20


def test_notes_and_questions_reach_the_page(results: Path, tmp_path: Path) -> None:
    notes = {"world": ["Made up <b>.", "On purpose."], "elsewhere": ["Not shown."]}
    write_report(read_table(results), tmp_path / "r.html", title="t", n_boot=20, notes=notes, intros={"gr": "Which?"})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    about = page[page.index("About the data") : page.index("</dl>")]
    assert "<dt>world</dt><dd>Made up &lt;b&gt;.</dd><dd>On purpose.</dd>" in about
    assert "Not shown" not in page
    assert page.count("<p>Which?</p>") == 1
    assert "About the data" not in write_page(results, tmp_path)


def write_page(results: Path, tmp_path: Path) -> str:
    write_report(read_table(results), tmp_path / "plain.html", title="t", n_boot=20)
    return (tmp_path / "plain.html").read_text(encoding="utf-8")


def tuning_table() -> Table:
    rows = []
    for name, shift in (("hstu", 0.0), ("dlrm", 0.01)):
        for i, rate in enumerate((3e-4, 1e-3, 3e-3, 1e-2, 3e-2)):
            row = {"study": "rates", "dataset": "world", "family": name, "train_flops": "1e12", "axis": "learning_rate"}
            row |= {"axis_value": repr(rate), "learning_rate": repr(rate), "label": f"r{i}", "history": "64"}
            value = 0.8 + shift + 0.01 * (i - 2) ** 2
            rows.append({**row, "validation/ne": repr(value), "validation/auc": repr(1.4 - value), "ne": "0.8"})
    return Table(list(rows[0]), rows, ["t.csv, line 2"] * len(rows))


def test_a_tuned_setting_is_compared_plainly_and_on_its_own_split(tmp_path: Path) -> None:
    analysis = write_report(tuning_table(), tmp_path / "r.html", title="t", metric="validation/ne", n_boot=20)
    (panel,) = analysis.panels
    assert (panel.axis, panel.comparisons) == ("learning_rate", ())
    assert [f.chosen for f in panel.families] == [None, None]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "the learning rate is tuned, not scaled" in page
    assert "best validation NE" in page
    assert "validation AUC against learning rate" in page
    assert "NE against training compute" not in page  # no test metric beside a choice made on validation rows
    assert "Held-out error of each form" not in page
    json.dumps(analysis.to_json(), allow_nan=False)


def test_only_points_that_differ_in_the_rate_are_joined() -> None:
    table = tuning_table()
    rows = [
        {**row, "model.dropout": d, "embedding_learning_rate": row["axis_value"] + "1"}
        for row in table.rows
        for d in "01"
    ]
    (panel,) = analyse(Table(list(rows[0]), rows, ["t.csv, line 2"] * 20), "validation/ne", n_boot=20).panels
    assert [sorted(map(len, family.lines)) for family in panel.families] == [[5, 5], [5, 5]]


def test_a_floor_of_one_history_is_drawn_only_where_it_is_the_floor() -> None:
    rows = []
    for i, history in enumerate((8, 16, 32, 64, 128)):
        row = {"study": "s", "dataset": "w", "family": "hstu", "axis": "history", "axis_value": str(history)}
        rows.append(row | {"history": str(history), "train_flops": f"1e{12 + i}", "ne": repr(0.9 - 0.01 * i)})
    table = Table(list(rows[0]), rows, ["t.csv, line 2"] * 5)
    floors = [Reference(f"Bayes NE, {n} events", 0.8 - n / 1e3, 0, 0, "ne", "w", n) for n in (8, 16, 512)]
    floors.append(Reference("Bayes NE, all events", 0.6, 0.6, 0.6, "ne", "w"))
    compute, along = analyse(table, "ne", n_boot=20).panels
    assert [r.applies(compute) for r in floors] == [False, False, False, True]
    assert [r.applies(along) for r in floors] == [True, True, False, True]
    drawn = [row["x"] for row in law_figure(along, references=floors).rows if row["kind"] == "reference"]
    assert drawn == [None, 8.0, 16.0]
    assert "Bayes NE at each history" in law_figure(along, references=floors).svg
