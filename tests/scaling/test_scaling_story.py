"""What the page tells a reader who was not there, its explorer, and what it leaves for a paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from experiments.cli import main
from scaling import Table, analyse
from scaling.doubts import doubts_of_laws, doubts_of_records
from scaling.explore import explore_data
from scaling.fit import Points, fit_forms, rivals
from scaling.latex import escape, laws_tex, tex_number
from scaling.page import data_html
from scaling.plots import law_figure, residual_figure
from scaling.protocol import protocol, question
from scaling.study import Analysis
from scaling.style import MARKERS, family_styles
from scaling.tables import forms_table, laws_table
from scaling.words import answer_html

SCRIPT = files("scaling").joinpath("report.js").read_text(encoding="utf-8")
TEN = """family,compute,loss
small & cheap,1e15,3.10
small & cheap,4e15,2.83
small & cheap,1.6e16,2.61
small & cheap,6.4e16,2.46
small & cheap,2.5e17,2.32
big_$net,1e15,3.42
big_$net,4e15,2.97
big_$net,1.6e16,2.63
big_$net,6.4e16,2.37
big_$net,2.5e17,2.16
"""


def table(*rows: dict[str, object]) -> Table:
    text = [{key: str(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in text for key in row))
    return Table(columns, text, [f"t.csv, line {i + 2}" for i in range(len(text))])


def ladder(name: str, values: list[float], **extra: object) -> list[dict[str, object]]:
    """A family whose NE at 1e10, 1e11, ... FLOPs is given."""
    rows = [{"family": name, "train_flops": 10.0 ** (10 + i), "ne": v} for i, v in enumerate(values)]
    return [{**row, **extra} for row in rows]


def falling(name: str, start: float, step: float, **extra: object) -> list[dict[str, object]]:
    wobble = (0.0, 3e-4, -2e-4, 1e-4, -2e-4, 0.0)
    return ladder(name, [start - step * i + w for i, w in enumerate(wobble)], **extra)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "points.csv").write_text(TEN, encoding="utf-8")
    page = folder / "page.html"
    main(
        ["report", str(folder / "points.csv"), "--x", "compute", "--y", "loss", "--group", "family", "--out", str(page)]
    )
    return page


def embedded(page: str) -> dict[str, list[dict[str, object]]]:
    found = re.search(r'<script type="application/json" id="explore-data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found.group(1))


def test_ten_points_of_a_stranger_are_fitted_plotted_and_reported_in_one_command(stranger: Path) -> None:
    page = stranger.read_text(encoding="utf-8")
    assert "How does loss change with compute, for each family: small &amp; cheap, big_$net?" in page
    assert "loss is lowest for small &amp; cheap at x = 10¹⁵" in page
    # In the order of the story.
    parts = ["Protocol</h2>", "In short:", "loss against compute</figcaption>", "Laws</h3>", "Residuals of loss"]
    parts += ["Forms compared", "What would change this conclusion", "Explore the trials", "Checklist</h2>"]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    figures = stranger.with_name("page_figures")
    names = {path.name for path in figures.iterdir()}
    assert {"laws.tex", "trials.csv", "loss-compute-law.pdf", "loss-compute-law.svg"} <= names
    assert (figures / "loss-compute-law.pdf").read_bytes().startswith(b"%PDF-")
    (section,) = embedded(page)["sections"]
    trials = section["trials"]
    assert isinstance(trials, list)
    shown = [(t["about"], t["values"]) for t in trials]
    lines = [line.split(",") for line in TEN.splitlines()[1:]]
    assert shown == [(name, {"loss": float(loss), "compute": float(x)}) for name, x, loss in lines]


def test_the_explorer_has_every_trial_and_only_what_can_be_drawn() -> None:
    done = {"study": "s", "dataset": "d", "seed": 1, "status": "done", "targets": 100, "recall@5": 0.25}
    rows = [{**r, **done, "trial": f"t{i}", "label": f"s{i}"} for i, r in enumerate(falling("hstu", 0.9, 0.02))]
    rows[2].pop("recall@5")
    lost = {**rows[0], "trial": "lost", "status": "diverged", "auc": 0.7}
    rows = [{**row, "auc": 0.5 + 0.01 * i, "dense_params": 10 + i} for i, row in enumerate(rows)] + [lost]
    main_one = analyse(table(*rows), n_boot=20)
    data = explore_data(table(*rows), [main_one], family_styles(["hstu"]))
    (section,) = data["sections"]
    assert data["families"] == [{"name": "hstu", "colour": "var(--c0)", "marker": "o"}]
    assert section["name"] == "s · d"
    # recall@5 is missing for one finished trial, and targets are the same in all of them.
    assert section["metrics"] == [("ne", "NE"), ("auc", "AUC")]
    assert section["axes"] == [("train_flops", "training compute C (FLOPs)"), ("dense_params", "dense parameters N")]
    trials, laws = section["trials"], section["laws"]
    assert isinstance(trials, list)
    assert isinstance(laws, list)
    assert trials[1]["about"] == "hstu s1, seed 1, trial t1"
    assert trials[1]["values"] == {"ne": 0.8803, "auc": 0.51, "train_flops": 1e11, "dense_params": 11.0}
    assert (trials[6]["about"], trials[6]["values"]) == ("hstu s0, seed 1, trial lost (diverged)", {})
    (law,) = laws
    assert (law["metric"], law["x"], law["points"][0][0]) == ("ne", "train_flops", 1e10)
    fit = main_one.panels[0].families[0].fit
    assert fit is not None
    assert law["points"][-1][1] == pytest.approx(float(fit.at([1e15])[0]), rel=1e-5)


def test_sections_are_apart_and_a_swept_axis_can_be_chosen() -> None:
    depth = [{**r, "study": "depth", "axis": "depth", "axis_value": 2**i} for i, r in enumerate(falling("a", 1, 0.01))]
    both = table(*depth, *falling("b", 0.9, 0.01, study="plain"))
    sections = explore_data(both, [analyse(both, n_boot=20)], family_styles(["a", "b"]))["sections"]
    assert [s["name"] for s in sections] == ["depth", "plain"]
    assert [s["axes"] for s in sections] == [
        [("train_flops", "training compute C (FLOPs)"), ("axis_value", "depth")],
        [("train_flops", "training compute C (FLOPs)")],
    ]
    assert [len(s["laws"]) for s in sections if isinstance(s["laws"], list)] == [2, 1]


def test_data_of_the_page_cannot_end_their_element() -> None:
    text = data_html("x", {"name": "</script><script>alert(1)</script>"})
    assert text.count("</script>") == 1
    assert json.loads(text[text.index(">") + 1 : -len("</script>")]) == {"name": "</script><script>alert(1)</script>"}


def test_the_script_finds_its_parts_and_draws_every_marker(stranger: Path) -> None:
    page = stranger.read_text(encoding="utf-8")
    explorer = page[page.index('id="explore"') : page.index('id="explore-data"')]
    wanted = set(re.findall(r"find\('(\w+)'\)", SCRIPT))
    assert wanted == set(re.findall(r'data-part="(\w+)"', explorer))
    assert wanted == {"chart", "tip", "legend", "count", "section", "metric", "axis"}
    drawn = SCRIPT[SCRIPT.index("const MARKERS") : SCRIPT.index("};", SCRIPT.index("const MARKERS"))]
    assert set(re.findall(r"'?([\w^])'?: 'M", drawn)) == set(MARKERS)
    for identifier in re.findall(r"read\('([\w-]+)'\)", SCRIPT):
        assert f'<script type="application/json" id="{identifier}">' in page
    # Until the script has run there is no empty explorer, nor a link to one.
    assert '<section id="explore" data-live hidden>' in page
    assert '<a href="#explore" data-live hidden>' in page


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
def test_the_script_reads_numbers_and_places_ticks() -> None:
    own = SCRIPT[SCRIPT.index("function shown") : SCRIPT.index("// The outline of each marker")]
    calls = "[[0.78867, 2.5e17, 1e-5, -1e6, 0].map(shown), logTicks(2e10, 9e12, 8), logTicks(3, 40, 8), "
    calls += "linearTicks(0.771, 0.823)]"
    run = subprocess.run(
        ["node", "-e", f"{own};console.log(JSON.stringify({calls}))"], capture_output=True, text=True, check=True
    )
    said, powers, short, linear = json.loads(run.stdout)
    assert said == ["0.78867", "2.5×10¹⁷", "10⁻⁵", "-1×10⁶", "0"]
    assert powers == [2e10, 5e10, 1e11, 2e11, 5e11, 1e12, 2e12, 5e12]
    assert short == [5, 10, 20]
    assert linear == [0.78, 0.79, 0.8, 0.81, 0.82]


def test_figures_for_a_paper_have_their_text_as_text_and_no_date() -> None:
    pdf = law_figure(analyse(table(*falling("hstu", 0.9, 0.02)), n_boot=20).panels[0]).pdf()
    assert pdf.startswith(b"%PDF-")
    assert b"CreationDate" not in pdf
    assert b"/TrueType" in pdf or b"/CIDFontType2" in pdf
    assert b"/Type3" not in pdf


def test_latex_escapes_names_and_writes_numbers(stranger: Path) -> None:
    assert escape(r"50% of #1 & {x}_y~$\a^2" + "\n<b>|") == (
        r"50\% of \#1 \& \{x\}\_y\textasciitilde{}\$\textbackslash{}a\textasciicircum{}2 \textless{}b\textgreater{}"
        r"\textbar{}"
    )
    assert [tex_number(v) for v in (0.77924, -2.5e6, 5.8838e-4, np.inf, -np.inf)] == [
        "0.7792",
        r"-2.500 \times 10^{6}",
        r"5.884 \times 10^{-4}",
        r"\infty",
        r"-\infty",
    ]
    lines = (stranger.with_name("page_figures") / "laws.tex").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert [row.split(" & ")[0] for row in rows] == ["family", r"small \& cheap", r"big\_\$net"]
    assert len({row.replace(r"\&", "").count("&") for row in rows}) == 1
    assert r"\begin{tabular}{llllrr}" in lines
    assert re.search(r"\$a\\,x\^\{-b\}\$ & \$18\.52\$ \$\[\d+\.\d+, \d+\.\d+\]\$ & \$0\.05211\$ \$\[0\.04", rows[1])


def test_latex_columns_hold_every_form_and_nothing_without_a_law() -> None:
    bent = [0.6 + 0.3 * 10 ** (-0.4 * i) for i in range(6)]
    tex = laws_tex(analyse(table(*ladder("bent", bent), *falling("line", 0.9, 0.02)), n_boot=20))
    assert "$a$ & $b$ & $c$ &" in tex
    (bent_row,) = [line for line in tex.splitlines() if line.startswith("bent")]
    assert r"$c + a\,C^{-b}$" in bent_row
    assert "$0.4000$" in bent_row  # the exponent, found to four digits
    (line_row,) = [line for line in tex.splitlines() if line.startswith("line")]
    assert line_row.count("&") == bent_row.count("&")
    assert " & -- & " in line_row
    assert laws_tex(analyse(table(*ladder("few", [0.9, 0.8])), n_boot=20)) == ""


def test_residuals_are_those_of_a_hand_calculation() -> None:
    """Least squares of 1.0, 0.7, 0.8 in ln x: 0.8333 at the middle, 0.1 less with every tenfold."""
    (panel,) = analyse(table(*ladder("a", [1.0, 0.7, 0.8])), form="loglin", n_boot=20).panels
    plot = residual_figure(panel)
    assert plot is not None
    by_hand = [100 * np.log(y / f) for y, f in zip((1.0, 0.7, 0.8), (2.8 / 3, 2.5 / 3, 2.2 / 3))]
    assert [row["y"] for row in plot.rows] == pytest.approx(by_hand)
    assert [row["x"] for row in plot.rows] == [1e10, 1e11, 1e12]
    assert "the largest is 17.4" in plot.alt


def said(analysis: Analysis, source: Table) -> dict[str, str]:
    return dict(doubts_of_laws(analysis.panels[0]) + doubts_of_records(analysis.panels[0], source))


def test_what_would_change_a_conclusion_is_said_with_its_number() -> None:
    first = falling("dlrm", 0.900, 0.01, epochs=3, flops_formula="v1", ne_error=0.004)
    second = falling("hstu", 0.8995, 0.0101, epochs=1, flops_formula="v2", ne_error=0.006)
    seeds = [{**row, "seed": s, "label": "x", "ne": float(str(row["ne"])) + 0.002 * s} for row in first for s in (0, 1)]
    lost = {**second[0], "status": "failed", "ne": ""}
    source = table(*seeds, *second, lost)
    found = said(analyse(source, n_boot=100), source)
    assert re.match(
        r"at C = 10¹⁵, the largest that all families were seen at, hstu is ahead of dlrm by 0\.00", found["Order"]
    )
    assert "7.0 decades" not in found["Range"]
    assert found["Range"].startswith("C spans 5.0 decades")
    assert "ends at 10¹⁵" in found["Range"]
    assert "differ by 0.0014 (median standard deviation over 6)" in found["Seeds"]
    assert "6 of 12 configurations have one seed" in found["Seeds"]
    assert "the best of hstu and of dlrm are 0.0020 apart" in found["Seeds"]
    assert "known to 0.004 " in found["Evaluation"]
    assert found["Repeated data"].startswith("12 of 18 trials pass over their data more than once (up to 3 times)")
    assert found["FLOPs"].startswith("the trials mix 2 conventions")
    assert found["Missing trials"].startswith("1 of 19 trials did not finish")
    assert "Evaluation sets" not in found


def test_only_doubts_that_apply_are_said() -> None:
    source = table(*falling("hstu", 0.9, 0.02, epochs=1, flops_formula="v1", eval_set="e"))
    found = said(analyse(source, n_boot=100), source)
    assert set(found) <= {"Form", "Range", "Forecasts", "Seeds"}
    assert "how much a seed moves a point is not known" in found["Seeds"]
    few = table(*ladder("a", [0.9, 0.8]))
    assert set(said(analyse(few, n_boot=20), few)) == {"Seeds"}


def test_an_order_is_called_open_only_where_the_interval_holds_zero() -> None:
    apart = table(*falling("dlrm", 0.9, 0.01), *falling("hstu", 0.8, 0.01))
    panel = analyse(apart, n_boot=200).panels[0]
    assert "zero is outside" in dict(doubts_of_laws(panel))["Order"]
    assert "hstu at C = 10¹⁰, the smallest that all were seen at (0.80" in answer_html(panel)
    close = table(*falling("dlrm", 0.9, 0.01), *falling("hstu", 0.89995, 0.01))
    panel = analyse(close, n_boot=200).panels[0]
    assert "zero is inside" in dict(doubts_of_laws(panel))["Order"]
    other = table(*falling("dlrm", 0.9, 0.01, eval_set="x"), *falling("hstu", 0.8, 0.01, eval_set="y"))
    panel = analyse(other, n_boot=20).panels[0]
    assert "Order" not in dict(doubts_of_laws(panel))  # families scored on different sets are not ranked
    assert answer_html(panel) == ""


def test_higher_is_better_turns_the_order() -> None:
    rows = [
        {**row, "auc": 1.5 - float(str(row.pop("ne")))} for row in falling("a", 0.8, 0.01) + falling("b", 0.7, 0.01)
    ]
    panel = analyse(table(*rows), "auc", n_boot=100).panels[0]
    assert "AUC is highest for b at C = 10¹⁰" in answer_html(panel)
    assert "b is ahead of a by 0.10 [0.0" in dict(doubts_of_laws(panel))["Order"]


def test_a_wrong_form_is_rejected_by_its_held_out_error() -> None:
    x = 10.0 ** np.arange(10, 20)
    bent = 0.6 + 0.3 * (x / 1e10) ** -0.4 + np.random.default_rng(0).normal(0, 1e-4, 10)
    points = Points(x, tuple(np.array([v]) for v in bent))
    found = {r.form: r for r in rivals(fit_forms(points, loss=True), "power_const")}
    assert set(found) == {"loglin", "power"}
    for rival in found.values():
        assert rival.rejected
        assert rival.held_out > 10 * rival.chosen_held_out
        assert not rival.forecasts_better
    panel = analyse(table(*ladder("bent", list(bent))), n_boot=20).panels[0]
    shown = forms_table(panel)
    assert "2 of 2 that are not drawn are rejected" in shown
    assert shown.count("<td>rejected</td>") == 2
    noisy = ladder("noisy", [0.90, 0.87, 0.86, 0.82, 0.81, 0.77])
    shown = forms_table(analyse(table(*noisy), n_boot=20).panels[0])
    assert "0 of 2 that are not drawn are rejected" in shown
    assert "<td>not told apart</td>" in shown


def test_a_form_that_forecasts_better_is_named_where_aicc_has_too_few_points() -> None:
    bent = [0.6 + 0.3 * 10 ** (-0.4 * i) for i in range(5)]  # five points leave the AICc of three parameters undefined
    panel = analyse(table(*ladder("bent", bent)), n_boot=20).panels[0]
    assert panel.families[0].chosen in {"loglin", "power"}
    assert "by the power law + constant (" in dict(doubts_of_laws(panel))["Forecasts by another form"]
    assert "forecasts better; too few configurations for its AICc" in forms_table(panel)


def test_the_laws_and_the_protocol_are_told() -> None:
    extra = {"epochs": 1, "impressions": 321, "validation": 0.1, "test": 0.2, "flops_formula": "v1"}
    source = table(*falling("dlrm", 0.9, 0.01, **extra), *falling("hstu", 0.95, 0.02, **extra))
    analysis = analyse(source, n_boot=50)
    steps = dict(protocol(analysis, source))
    assert steps["Trials"].startswith("12 trials (12 done) of 2 families: dlrm, hstu. Configurations of a family: 6;")
    assert "1e+10 to 1e+15 (5.0 decades)" in steps["Training"]
    assert "impressions scored: 321; split: global time, validation share 0.1, test share 0.2" in steps["Scoring"]
    by_users = dict(protocol(analysis, table(*falling("dlrm", 0.9, 0.01, split="users", **extra))))
    assert "split: users, validation share 0.1, test share 0.2" in by_users["Scoring"]
    assert "bootstrap" in steps["Fitting"]
    assert question(analysis) == "How does NE change with training compute C (FLOPs), for each family: dlrm, hstu?"
    laws = laws_table(analysis.panels[0])
    assert laws.count("<tr>") == 3
    assert "per tenfold C" in laws
    assert re.search(r"−0\.010\d* \[−0\.01", laws)
