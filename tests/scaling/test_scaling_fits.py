"""One law of anybody's table, and what to do with a budget: columns by name, groups, refusals, cautions, recovery."""

import json
from pathlib import Path

import numpy as np
import pytest

from scaling.fits import ESTIMATED, Columns, Resampling, fit_law
from scaling.recommend import recommend
from scaling.table import FloatArray, Table, TableError, read_table, rows_to_csv

FEW = Resampling(n_boot=60)


def table(path: Path, **columns: FloatArray | list[str]) -> Table:
    rows = [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)]
    path.write_text(rows_to_csv(list(columns), rows), encoding="utf-8")
    return read_table([path])


def points(path: Path, noise: float = 0.002, **more: FloatArray | list[str]) -> Table:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
    loss = (1.7 + 400 * n**-0.34 + 400 * d**-0.28) * np.exp(np.random.default_rng(2).normal(0, noise, 36))
    return table(path, N=n, D=d, loss=loss, **more)


def test_a_joint_law_of_named_columns(tmp_path: Path) -> None:
    columns = Columns(y="loss", n="N", d="D")
    found = fit_law(points(tmp_path / "p.csv"), "chinchilla", columns, estimator="huber", resampling=FEW)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    params, intervals = found["params"], found["intervals"]
    assert isinstance(params, dict)
    assert isinstance(intervals, dict)
    assert params["alpha"] == pytest.approx(0.34, rel=0.05)
    assert intervals["alpha"][0] < 0.34 < intervals["alpha"][1]
    assert found["objective"] == pytest.approx(found["objective"])
    assert found["warnings"] == []
    assert found["estimator"] == "huber"


def codes(found: dict[str, object]) -> set[str]:
    warnings = found["warnings"]
    assert isinstance(warnings, list)
    return {one["code"] for one in warnings}


def test_cautions_name_what_is_wrong_with_a_table(tmp_path: Path) -> None:
    columns = Columns(y="loss", n="N", d="D")
    mixed = points(tmp_path / "m.csv", epochs=np.full(36, 4.0), flops_formula=["6ND"] * 18 + ["measured"] * 18)
    found = fit_law(mixed, "chinchilla", columns, estimator="huber", resampling=FEW)
    assert codes(found) == {"mixed_flops_formula", "repeated_data"}
    lost = points(tmp_path / "l.csv", status=["done"] * 30 + ["diverged"] * 6)
    assert fit_law(lost, "chinchilla", columns, estimator="lsq", resampling=FEW)["n"] == 30
    small = np.geomspace(1e6, 1e7, 12)
    d = 1e8 * np.tile([1.0, 2.0, 4.0], 4)
    noisy = (1.7 + 400 * small**-0.34 + 400 * d**-0.28) * np.exp(np.random.default_rng(0).normal(0, 0.02, 12))
    short = fit_law(
        table(tmp_path / "s.csv", N=small, D=d, loss=noisy), "chinchilla", columns, estimator="lsq-log", resampling=FEW
    )
    assert "E_unidentified" in codes(short)
    gap = points(tmp_path / "g.csv")
    gap.rows[3]["loss"] = ""
    assert "excluded_rows" in codes(fit_law(gap, "chinchilla", columns, estimator="lsq", resampling=FEW))


def test_curves_of_groups_have_forms_with_errors(tmp_path: Path) -> None:
    x = np.tile(np.geomspace(1e9, 1e15, 10), 2)
    wiggle = 1e-4 * np.sin(7 * np.arange(20))
    y = np.where(np.arange(20) < 10, 0.1 + 0.0195 * np.log(x), 0.3 - 2 * x**-0.15) + wiggle
    family = ["gr"] * 10 + ["dlrm"] * 10
    found = fit_law(
        table(tmp_path / "c.csv", family=family, compute=x, hr100=y),
        "curve",
        Columns(y="hr100", x="compute", group="family"),
        estimator="huber",
        resampling=FEW,
    )
    groups = found["groups"]
    assert isinstance(groups, dict)
    assert list(groups) == ["gr", "dlrm"]
    assert groups["gr"]["form"] == "loglin"
    assert groups["gr"]["params"]["b"] == pytest.approx(0.0195, rel=0.01)
    assert groups["dlrm"]["form"] == "power_const"
    assert groups["dlrm"]["params"]["c"] == pytest.approx(0.3, rel=0.01)
    assert {"aicc", "held_out_mape_percent"} <= groups["dlrm"]["forms"]["loglin"].keys()
    assert "form_rejected" in codes(groups["dlrm"])


def test_isoflop_and_envelope_by_name(tmp_path: Path) -> None:
    compute = np.repeat(np.geomspace(1e18, 1e21, 4), 7)
    n = 0.6 * (compute / 6) ** 0.5 * np.tile(np.geomspace(1 / 3, 3, 7), 4)
    y = 2.0 + 0.1 * np.log(n / (0.6 * (compute / 6) ** 0.5)) ** 2 - 0.01 * np.log(compute)
    columns = Columns(y="loss", n="N", compute="C", run="run")
    own = table(tmp_path / "i.csv", N=n, C=compute, loss=y)
    found = fit_law(own, "isoflop", columns, estimator="huber", resampling=FEW)
    assert isinstance(found["params"], dict)
    assert found["params"]["a"] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(TableError, match="'run' is missing"):
        fit_law(own, "envelope", columns, estimator="huber", resampling=FEW)


@pytest.mark.parametrize(
    ("law", "columns", "said"),
    [
        ("cubic", Columns(y="loss"), "unknown law 'cubic'"),
        ("chinchilla", Columns(y="loss", n="params"), "'params' is missing"),
        ("chinchilla", Columns(y="word", n="N", d="D"), "'a' in the column 'word' is not a number"),
        ("curve", Columns(y="loss", x="one"), "too few for any law"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(tmp_path: Path, law: str, columns: Columns, said: str) -> None:
    own = points(tmp_path / "p.csv", word=["a"] * 36, one=np.ones(36))
    with pytest.raises(TableError, match=said):
        fit_law(own, law, columns, estimator="huber", resampling=FEW)
    assert "chinchilla" in ESTIMATED


def study(path: Path) -> Path:
    """Sizes and targets varied apart, at a cost of 18 N D; wider models are deeper."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e7, 5), np.geomspace(1e5, 1e8, 5)))
    noise = np.exp(np.random.default_rng(1).normal(0, 2e-4, 25))
    ne = (0.7 + 2 * n**-0.3 + 5 * d**-0.3) * noise
    table(
        path,
        family=["hstu"] * 25,
        label=[f"{a:.0f} {b:.0f}" for a, b in zip(n, d)],
        dense_params=n,
        targets=d,
        train_flops=18 * n * d,
        ne=ne,
        **{"model.width": np.sqrt(n) / 4, "model.heads": np.full(25, 2.0)},
    )
    return path


def test_a_budget_is_spent_as_the_joint_law_says(tmp_path: Path) -> None:
    """18 N D with equal exponents: N* / D* = (2 / 5)^(1 / 0.3), by hand."""
    ((one,),) = recommend([study(tmp_path / "s.csv")], [1.8e15], n_boot=60)
    n, d = one.sizes["dense_params"][0], one.sizes["targets"][0]
    assert n * d == pytest.approx(1e14, rel=1e-6)
    assert n / d == pytest.approx((2 / 5) ** (1 / 0.3), rel=0.05)
    assert one.metric == pytest.approx(0.7 + 2 * n**-0.3 + 5 * d**-0.3, rel=1e-3)
    assert one.interval is not None
    assert one.interval[0] < one.metric < one.interval[1]
    assert one.shape["model.width"] == pytest.approx(np.sqrt(n) / 4, rel=1e-6)
    assert one.shape["model.heads"] == 2.0
    assert not one.warnings
    json.dumps(one.to_json(), allow_nan=False)
    with pytest.raises(TableError, match="positive number of FLOPs"):
        recommend([tmp_path / "s.csv"], [0.0])


def test_a_budget_whose_law_has_no_optimum_follows_the_best_configurations(tmp_path: Path) -> None:
    """Twice as much history is always worse."""
    own = tmp_path / "h.csv"
    n, d, h = (v.ravel() for v in np.meshgrid(np.geomspace(1e4, 1e7, 4), np.geomspace(1e5, 1e8, 4), [16, 32, 64]))
    noise = np.exp(np.random.default_rng(1).normal(0, 2e-4, len(n)))
    ne = (0.7 + 2 * n**-0.3 + 5 * d**-0.3 + 0.001 * h**0.5) * noise
    columns = {"dense_params": n, "targets": d, "history": h, "train_flops": n * d * h**0.5, "ne": ne}
    table(own, family=["hstu"] * len(n), **columns)
    ((one,),) = recommend([own], [1e15], n_boot=60)
    assert "best configurations" in one.law
    assert "the law has no best use of a budget: its exponent gamma is -" in " ".join(w.text for w in one.warnings)
    assert one.interval is not None
    assert np.isfinite([one.metric, *one.interval]).all()


def test_a_budget_without_a_joint_law_follows_the_best_configurations(tmp_path: Path) -> None:
    x = np.geomspace(1e10, 1e14, 8)
    own = tmp_path / "c.csv"
    table(
        own,
        family=["dlrm"] * 8,
        label=[f"s{i}" for i in range(8)],
        dense_params=x**0.5,
        targets=np.full(8, 1e6),
        train_flops=x,
        ne=0.7 + 5 * x**-0.15,
    )
    (inside,), (one,), (far,) = recommend([own], [1e13, 1e15, 1e16], n_boot=60)
    assert one.sizes["dense_params"][0] == pytest.approx(1e15**0.5, rel=1e-6)
    assert one.metric == pytest.approx(0.7 + 5 * 1e15**-0.15, rel=1e-4)
    assert (inside.nearest, one.nearest) == ("s5", "s7")
    outside = [[w.code for w in advice.warnings].count("far_extrapolation") for advice in (inside, one, far)]
    assert outside == [0, 0, 1]


def test_a_budget_is_spent_by_a_table_that_names_its_columns_otherwise(tmp_path: Path) -> None:
    """The same advice; a column that is missing or holds a word is refused by its own name."""
    own = study(tmp_path / "s.csv")
    header, *rows = own.read_text(encoding="utf-8").splitlines()
    names = {"N": "dense_params", "D": "targets", "C": "train_flops", "kind": "family"}
    for new, old in names.items():
        header = header.replace(old, new)
    other = tmp_path / "o.csv"
    other.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    assert recommend([other], [1e15], names=names, n_boot=60) == recommend([own], [1e15], n_boot=60)
    with pytest.raises(TableError, match="the column 'params' is missing"):
        recommend([other], [1e15], names={**names, "params": "dense_params"})
    with pytest.raises(TableError, match="line 2: 'hstu' in the column 'kind' is not a number"):
        recommend([other], [1e15], names={"kind": "targets"})


def test_what_a_budget_is_nearest_to_has_a_name_without_labels(tmp_path: Path) -> None:
    x = np.geomspace(1e10, 1e14, 8)
    table(tmp_path / "c.csv", compute=x, loss=0.7 + 5 * x**-0.15)
    ((one,),) = recommend([tmp_path / "c.csv"], [1e15], "loss", names={"compute": "train_flops"}, n_boot=60)
    assert (one.family, one.nearest) == ("all runs", "1e+14 FLOPs")
