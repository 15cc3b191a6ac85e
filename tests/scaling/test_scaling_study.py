"""What an analysis compares, pools and warns about, and how the page and the checklist say it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scaling import Table, TableError, analyse, read_table, write_report
from scaling.bootstrap import bootstrap
from scaling.checklist import checklist
from scaling.fit import Points, choose, fit_forms, shared_held_out
from scaling.frontier import Family, compare
from scaling.study import Analysis
from scaling.tables import _is_numeric, _trial_cell
from scaling.words import _crossing_limits, times_less

COMPUTE = np.geomspace(1e10, 1e14, 6)


def table(*rows: dict[str, object]) -> Table:
    text = [{key: str(value) for key, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(key for row in text for key in row))
    return Table(columns, text, [f"t.csv, line {i + 2}" for i in range(len(text))])


def family(name: str, start: float, metric: str = "ne", **extra: object) -> list[dict[str, object]]:
    return [{"family": name, "train_flops": float(x), metric: start - 0.01 * i, **extra} for i, x in enumerate(COMPUTE)]


def compared_with(*names_and_starts: tuple[str, float]) -> str:
    rows = [row for name, start in names_and_starts for row in family(name, start)]
    return analyse(table(*rows), n_boot=20).panels[0].comparisons[0].ratio.base


@pytest.mark.parametrize(
    ("families", "base"),
    [
        ([("hstu", 0.8), ("dcn", 0.82), ("dlrm", 0.9)], "dlrm"),
        ([("hstu", 0.8), ("DLRM", 0.9), ("dcn", 0.82)], "DLRM"),
        ([("hstu", 0.8), ("dcn_v2", 0.82), ("din", 0.9)], "dcn_v2"),
        ([("dinner", 0.8), ("hstu-mlp", 0.82), ("hstu", 0.9)], "hstu"),
    ],
)
def test_base_is_dlrm_else_the_best_classical_else_the_worst(families: list[tuple[str, float]], base: str) -> None:
    assert compared_with(*families) == base


def test_ratio_in_words_reads_either_way() -> None:
    assert times_less(2.0, 1.5, 3.0) == "2.00 [1.50, 3.00] times less"
    more = times_less(0.2, 0.1, 0.25)
    assert more.startswith("5.0")
    assert more.endswith("times more")
    assert more.index("4.0") < more.index("10")
    assert "[" not in times_less(2.0, np.nan, np.nan)
    assert "∞" in times_less(0.5, 0.0, 1.0)


def test_page_gives_the_ratio_at_both_ends(tmp_path: Path) -> None:
    steep = [{**row, "ne": 0.93 - 0.03 * i} for i, row in enumerate(family("hstu", 0.93))]
    write_report(table(*family("dlrm", 0.9), *steep), tmp_path / "r.html", title="t", n_boot=20)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    said = page[page.index("hstu against dlrm:") :].split("</p>")[0]
    assert said.count("it needs") == 2
    assert said.index("times more") < said.index("times less")  # the easier end comes first
    assert "the curves cross at C" in said


@pytest.mark.parametrize("column", ["model.width", "segments", "fraction", "weight_decay", "beta2", "clip", "test"])
def test_trials_that_differ_in_a_setting_are_not_pooled(column: str) -> None:
    rows = [{**row, column: value, "label": "s", "seed": 0} for value in (1, 2) for row in family("a", 0.9)]
    (result,) = analyse(table(*rows), n_boot=20).panels[0].families
    assert [len(run) for run in result.points.runs] == [1] * 12


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["trial,study,family,label,axis,ne,auc", *lines]) + "\n", encoding="utf-8")
    return path


def test_repeated_trials_enter_once_and_disagreeing_ones_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", "t1,s,f,l,depth,0.8,", "t1,s,f,l,width,0.8,", ",s,f,l,depth,0.7,")
    again = write(tmp_path / "b.csv", "t1,s,f,l,depth,0.80,", "t2,s,f,l,depth,0.8,", ",s,f,l,depth,0.6,")
    assert read_table([first, again]).text("trial") == ["t1", "t1", "", "t2", ""]
    other = write(tmp_path / "c.csv", "t1,s,f,l,depth,0.9,")
    with pytest.raises(TableError, match=r"a\.csv, line 2 and .*c\.csv, line 2: the trial 't1' .* different 'ne'"):
        read_table([first, other])
    half = write(tmp_path / "d.csv", "t1,s,f,l,depth,0.8,0.7")
    with pytest.raises(TableError, match="different 'auc'"):
        read_table([first, half])


def test_families_on_different_impressions_are_not_compared(tmp_path: Path) -> None:
    def rows(eval_set: str, formula: str) -> Table:
        mine = family("dlrm", 0.9, eval_set="x", flops_formula="v1")
        return table(*mine, *family("hstu", 0.8, eval_set=eval_set, flops_formula=formula))

    same = analyse(rows("x", "v1"), n_boot=20).panels[0]
    assert (len(same.comparisons), same.warnings) == (1, ())
    formulas = analyse(rows("x", "v2"), n_boot=20).panels[0]
    assert [w.code for w in formulas.warnings] == ["mixed_flops_formula"]
    assert len(formulas.comparisons) == 1
    analysis = write_report(rows("y", "v1"), tmp_path / "r.html", title="t", n_boot=20)
    assert [w.code for w in analysis.panels[0].warnings] == ["mixed_eval_set"]
    assert analysis.panels[0].comparisons == ()
    assert "the families are not compared" in (tmp_path / "r.html").read_text(encoding="utf-8")


def curve(name: str, x: np.ndarray, f: Callable[[np.ndarray], np.ndarray], form: str = "loglin") -> Family:
    points = Points(x, tuple(np.array([v]) for v in f(x)))
    return Family(name, points, fit_forms(points, loss=True)[form], None)


def test_crossings_are_looked_for_only_where_both_were_observed() -> None:
    base = curve("a", np.geomspace(1e8, 1e10, 5), lambda x: 1.0 - 0.01 * np.log10(x))
    later = curve("b", np.geomspace(1e9, 1e15, 5), lambda x: 1.12 - 0.02 * np.log10(x))  # they meet at 1e12
    assert (compare(base, later).crossing, compare(base, later).crossings) == (None, 0)
    assert compare(base, curve("a", base.points.x, lambda x: 1.0 - 0.01 * np.log10(x))).crossings == 0


def test_several_crossings_are_counted_and_the_first_is_given() -> None:
    x = np.geomspace(1e8, 1e14, 9)
    bent = curve("a", x, lambda x: 0.6 + 0.3 * (x / 1e8) ** -0.2, "power_const")
    line = curve("b", x, lambda x: 0.85 - 0.0425 * np.log10(x / 1e8))
    result = compare(bent, line)
    assert result.crossings == 2
    assert result.crossing is not None
    assert result.crossing < 1e11


def noisy(name: str, y: np.ndarray, form: str, seed: int) -> Family:
    x = np.geomspace(2e10, 8e12, len(y))
    points = Points(x, tuple(np.array([v]) for v in y))
    fit = fit_forms(points, loss=True)[form]
    return Family(name, points, fit, bootstrap(points, fit, loss=True, n_boot=200, seed=seed))


@pytest.mark.parametrize("noise", [1e-9, 1e-3, 4e-3])
def test_the_interval_of_a_crossing_holds_it(noise: float) -> None:
    rng = np.random.default_rng(1)
    u = np.geomspace(1, 400, 7)
    found = 0
    for seed in range(8):
        base = noisy("a", 0.795 - 0.001 * np.log10(u) + rng.normal(0, noise, 7), "loglin", seed)
        new = noisy("b", 0.785 + 0.035 * u**-0.6 + rng.normal(0, noise, 7), "power_const", seed + 100)
        result = compare(base, new)
        if result.crossing is None:
            continue
        found += 1
        assert result.crossing_interval is not None
        low, high = result.crossing_interval
        assert low <= result.crossing <= high
        if noise == 1e-9:
            assert high / low < 1.001
        if result.crossing_share is not None and result.crossing_share < 0.9:
            assert low == 0 or high == np.inf  # draws that never cross leave an end open
    assert found >= 4


def test_a_crossing_limit_outside_the_range_is_said_in_words() -> None:
    assert _crossing_limits(None) == ""
    assert _crossing_limits((1.0, 2.0)) == " [1.00, 2.00]"
    assert _crossing_limits((0.0, 2.0)) == " (95 %: up to 2.00, no lower limit inside the range both cover)"
    assert _crossing_limits((1.0, np.inf)) == " (95 %: from 1.00, no upper limit inside the range both cover)"
    assert "no limit inside" in _crossing_limits((0.0, np.inf))


def grid_rows(**fixed: object) -> list[dict[str, object]]:
    """Every size at every number of targets, one law in both, flops 6ND."""
    rows: list[dict[str, object]] = []
    for n in (1e4, 4e4, 1.6e5):
        for d in (5e4, 2e5, 8e5):
            row = {"family": "hstu", "label": f"{n:g} {d:g}", "dense_params": n, "targets": d, "train_flops": 6 * n * d}
            rows.append({**row, "ne": 0.75 + 0.9 * n**-0.3 + 20 * d**-0.45, **fixed})
    return rows


def test_the_joint_law_is_fitted_where_both_sizes_vary(tmp_path: Path) -> None:
    analysis = write_report(table(*grid_rows()), tmp_path / "r.html", title="t", n_boot=20)
    joint = analysis.panels[0].families[0].joint
    assert joint is not None
    assert joint.fit.params["E"] == pytest.approx(0.75, abs=1e-3)
    assert joint.fit.params["beta"] == pytest.approx(0.45, abs=1e-2)
    assert joint.draws.intervals()["E"][0] <= joint.fit.params["E"] + 1e-6
    assert "In parameters N and targets D" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert '"share_of_starts"' in json.dumps(analysis.to_json(), allow_nan=False)
    for rows in (grid_rows()[:7], grid_rows(targets=1e5), [{**r, "targets": r["dense_params"]} for r in grid_rows()]):
        assert analyse(table(*rows), n_boot=20).panels[0].families[0].joint is None


def test_trials_are_sorted_as_numbers_where_every_cell_is_one() -> None:
    shown = table({"a": "2.5", "b": "1e3", "c": "none", "d": "2"}, {"a": "", "b": "fast", "c": "", "d": "10"})
    assert [_is_numeric(shown, c) for c in "abcd"] == [True, False, False, True]
    assert _trial_cell("123456789012", "trial", True, "") == ("123456789012", "123456789012")
    assert _trial_cell("2.10", "version/jax", True, "")[0] == "2.10"
    assert _trial_cell("4903281949.99", "achieved_flops", True, "")[0] == "4.90328e+09"


def answers(source: Table) -> tuple[Analysis, dict[str, str]]:
    analysis = analyse(source, n_boot=20)
    return analysis, dict(checklist(analysis, source))


def test_checklist_tells_impressions_rates_and_the_split() -> None:
    extra: dict[str, object] = {"impressions": 321, "eval_impressions": 5000, "validation": 0.1, "test": 0.2}
    rows = family("dlrm", 0.9, learning_rate=0.003, **{"model.width": 32}, **extra)
    rows += family("hstu", 0.8, learning_rate=0.001, **{"model.width": 64}, **extra)
    _, said = answers(table(*rows))
    data = said["Data, split, metric, candidates, base rate"]
    assert "impressions: 321" in data
    assert "5000" not in data
    assert "split: global time, validation share 0.1, test share 0.2" in data
    rates = said["Learning rate, batch, warm-up, decay"]
    assert "by width: 32: 0.003; 64: 0.001" in rates
    assert "by the study's rule or flags; see the table" in rates
    _, said = answers(table(*family("hstu", 0.3, "hr@10", **extra)))
    assert "split: leave-last-out;" in said["Data, split, metric, candidates, base rate"]
    _, said = answers(table(*family("hstu", 0.8)))
    assert "split: not recorded" in said["Data, split, metric, candidates, base rate"]


def test_checklist_gives_the_evaluation_noise_where_it_is_recorded() -> None:
    rows = family("dlrm", 0.9)
    question = "Seeds and evaluation noise"
    assert "evaluation noise: not recorded" in answers(table(*rows))[1][question]
    rows = [{**row, "ne_error": 0.001 * (i + 1)} for i, row in enumerate(rows[:5])] + rows[5:]
    assert "median standard error of NE 0.003 over 5 trials" in answers(table(*rows))[1][question]


def test_forms_are_told_apart_on_the_cuts_they_share() -> None:
    x = np.geomspace(1e10, 1e15, 12)
    noise = np.random.default_rng(3).normal(0, 2e-3, 12)
    points = Points(x, tuple(np.array([v]) for v in 0.9 - 0.01 * np.log(x / 1e10) + noise))
    fits = fit_forms(points, loss=True, forms=("loglin", "power", "power_const"))
    shared = set.intersection(*({cut.cut for cut in fit.held_out} for fit in fits.values()))
    assert len(shared) == len(fits["power_const"].held_out) == 4
    assert len(fits["loglin"].held_out) == 5
    by_hand = [cut.mape for cut in fits["loglin"].held_out if cut.cut in shared]
    assert shared_held_out(fits)["loglin"] == pytest.approx(np.mean(by_hand))
    assert choose(fits) in fits


def test_each_section_keeps_its_own_metric(tmp_path: Path) -> None:
    ranking = family("dlrm", 0.9, study="rank", auc=0.7)
    both = table(*ranking, *family("hstu", 0.3, "hr@10", study="retrieve"))
    for metric in (None, "ne"):
        analysis = analyse(both, metric, n_boot=20)
        assert [(p.study, p.metric) for p in analysis.panels] == [("rank", "ne"), ("retrieve", "hr@10")]
    panels = write_report(both, tmp_path / "r.html", title="t", metric="ne", n_boot=20).to_json()["panels"]
    assert isinstance(panels, list)
    assert [p["higher_is_better"] for p in panels] == [False, True]
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Main metric: NE, lower is better; HR@10, higher is better." in page
    assert page.count("HR@10 against training compute") == page.count("NE against training compute") > 0


def test_a_flat_base_has_no_equal_quality_ratio(tmp_path: Path) -> None:
    """Where the base does not improve with compute, the page says so and prints no point estimate."""
    noise = np.random.default_rng(0).normal(0, 1e-3, len(COMPUTE))
    flat = [{"family": "dlrm", "train_flops": float(x), "ne": 0.8 + e} for x, e in zip(COMPUTE, noise)]
    write_report(table(*flat, *family("hstu", 0.82)), tmp_path / "page.html", title="flat", n_boot=200)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "the compute for equal quality is not determined by these trials" in page
    assert "times less C" not in page


def test_a_table_without_families_is_one(tmp_path: Path) -> None:
    x = np.geomspace(1e12, 1e15, 10)
    rows = [{"c": float(a), "my_error": float(0.6 + 3 * a**-0.1)} for a in x]
    analysis = write_report(table(*rows), tmp_path / "r.html", title="t", metric="my_error", x="c", n_boot=50)
    (family,) = analysis.panels[0].families
    assert family.name == "all runs"
    assert family.chosen == "power_const"
    with pytest.raises(TableError, match="'kind' is missing"):
        analyse(table(*rows), "my_error", x="c", group="kind")
