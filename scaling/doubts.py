"""What would change a conclusion: the facts of a panel that its laws rest on, each in a sentence with its number.

Only what applies is said; nothing here judges a law, it says how far the trials carry it.
"""

from __future__ import annotations

import numpy as np

from scaling.family import FamilyResult
from scaling.fit import REJECTED_GAP, rivals
from scaling.frontier import common_x, lead, ranked
from scaling.laws import FORM_NAMES
from scaling.metrics import higher_is_better, metric_name
from scaling.panel import Panel
from scaling.plots import x_symbol
from scaling.records import evaluation_errors
from scaling.style import interval_text, number, tick, with_interval
from scaling.table import Table
from scaling.trials import done

_BEYOND = 10.0
# Draws of which so many cross, and so many do not, leave the crossing open.
_OPEN = (0.05, 0.95)


def doubts_of_laws(panel: Panel) -> list[tuple[str, str]]:
    """(What, sentence) pairs that follow from the laws of a panel; empty where none was fitted."""
    found = [
        ("Order", _order(panel)),
        ("Steepness", _steepness(panel)),
        ("Compute ratio", _ratios(panel)),
        ("Crossing", _crossings(panel)),
        ("Exponents", _exponents(panel)),
        ("Form", _forms(panel)),
        ("Forecasts by another form", _better_forecasts(panel)),
        ("Range", _range(panel)),
        ("Forecasts", _forecasts(panel)),
    ]
    return [(what, text) for what, text in found if text]


def doubts_of_records(panel: Panel, part: Table) -> list[tuple[str, str]]:
    """(What, sentence) pairs that follow from how the trials were made; `part` holds all trials of the section."""
    finished = part.where(done(part))
    found = [
        ("Seeds", _seeds(panel)),
        ("Evaluation", _evaluation(panel, finished)),
        ("Repeated data", _repeats(finished)),
        (
            "FLOPs",
            _mixed(finished, "flops_formula", "conventions: one model would stand at several places on x"),
        ),
        ("Evaluation sets", _mixed(finished, "eval_set", "evaluation sets: families scored on different ones differ")),
        ("Missing trials", _missing(part, len(finished))),
    ]
    return [(what, text) for what, text in found if text]


def _at(x: float) -> str:
    return tick(float(f"{x:.3g}"))


def _order(panel: Panel) -> str:
    """Whether the best two laws are told apart at the largest x that all families were seen at."""
    fitted, rising = panel.fitted, higher_is_better(panel.metric)
    ends = common_x(*fitted) if len(fitted) > 1 and panel.comparable else None
    if ends is None:
        return ""
    first, second = ranked(fitted, ends[1], rising=rising)[:2]
    ahead, limits = lead(first, second, ends[1], rising=rising)
    said = (
        f"at {x_symbol(panel)} = {_at(ends[1])}, the largest that all families were seen at, {first.name} is ahead of "
        f"{second.name} by {with_interval(ahead, limits, 2)}"
    )
    if limits is None:
        return f"{said}, without an interval: too few configurations."
    if limits[0] <= 0 <= limits[1]:
        return f"{said}: zero is inside, so more runs could turn their order."
    return f"{said}: zero is outside, so it takes more than scatter (a better tuned {second.name}) to turn their order."


def _steepness(panel: Panel) -> str:
    open_ = [(c, c.exponents) for c in panel.comparisons if c.exponents is not None and not c.exponents.differ]
    if not open_:
        return ""
    said = [f"{c.ratio.new} {with_interval(e.difference, e.interval, 2)}" for c, e in open_]
    base = open_[0][0].ratio.base
    return (
        f"under one form for both, these are not told apart from {base} in how steep they are (difference of the "
        f"exponents): {', '.join(said)}. An offset may be all there is."
    )


def _ratios(panel: Panel) -> str:
    said = []
    for c in panel.comparisons:
        limits = c.ratio.mean_interval
        if c.ratio.mean is not None and limits is not None and limits[0] <= 1 <= limits[1]:
            said.append(f"{c.ratio.new} {number(c.ratio.mean, 3)} {interval_text(limits, 3)}")
    if not said:
        return ""
    return (
        f"whether these need less or more compute than {panel.comparisons[0].ratio.base} for equal quality is open: "
        f"the interval of the ratio holds 1, {', '.join(said)}."
    )


def _crossings(panel: Panel) -> str:
    said = [
        f"{c.ratio.new} crosses {c.ratio.base} in {c.crossing_share:.0%}"
        for c in panel.comparisons
        if c.crossing_share is not None and _OPEN[0] < c.crossing_share < _OPEN[1]
    ]
    return f"inside the range both cover, {', '.join(said)} of the bootstrap's draws: more runs decide." if said else ""


def _exponents(panel: Panel) -> str:
    """The exponents known to no better than a factor of two."""
    said = []
    for family in panel.families:
        if family.boot is not None and family.chosen != "loglin":
            low, high = family.boot.params()["b"]
            if low <= 0 or high > 2 * low:
                assert family.fit is not None
                said.append(f"{family.name} {with_interval(family.fit.params['b'], (low, high), 2)}")
    return f"known to no better than a factor of two: {', '.join(said)}." if said else ""


def _forms(panel: Panel) -> str:
    """What the forms that AICc leaves standing say ten times beyond the data, where they disagree most."""
    said = [text for family in panel.families if (text := _disagreement(family))]
    if not said:
        return ""
    return (
        f"ten times beyond its largest {x_symbol(panel)}, a family's {metric_name(panel.metric)} depends on a form "
        f"that the trials do not settle (AICc less than {REJECTED_GAP:g} apart): {'; '.join(said)}."
    )


def _disagreement(family: FamilyResult) -> str:
    if family.fit is None or family.chosen is None:
        return ""
    x = [float(family.points.x.max()) * _BEYOND]
    own = float(family.fit.at(x)[0])
    standing = [r.form for r in rivals(family.fits, family.chosen) if abs(r.aicc_gap) < REJECTED_GAP and not r.rejected]
    others = {form: float(family.fits[form].at(x)[0]) for form in standing if not family.fits[form].degenerate}
    if not others:
        return ""
    form = max(others, key=lambda form: abs(others[form] - own))
    drawn, other = number(own, 4), number(others[form], 4)
    said = f"{family.name} {drawn} by the {FORM_NAMES[family.chosen]}, {other} by the {FORM_NAMES[form]}"
    return said if drawn != other else ""


def _better_forecasts(panel: Panel) -> str:
    """The forms that were not drawn although they forecast larger sizes better."""
    said = [
        f"{family.name} by the {FORM_NAMES[rival.form]} ({rival.held_out:.2g} %, drawn: {FORM_NAMES[family.chosen]}, "
        f"{rival.chosen_held_out:.2g} %)"
        for family in panel.families
        if family.chosen
        for rival in rivals(family.fits, family.chosen)
        if rival.forecasts_better and not family.fits[rival.form].degenerate
    ]
    if not said:
        return ""
    return (
        f"fitted below a cut, another form missed larger sizes by less than half as much: {', '.join(said)}. With more "
        "configurations AICc could choose it."
    )


def _range(panel: Panel) -> str:
    fitted = panel.fitted
    if not fitted:
        return ""
    spans = {f.name: f.points.decades for f in fitted}
    shortest, top = min(spans, key=lambda name: spans[name]), max(float(f.points.x.max()) for f in fitted)
    return (
        f"{x_symbol(panel)} spans {spans[shortest]:.1f} decades ({shortest}, the shortest) and ends at {_at(top)}; "
        "what the laws say beyond is extrapolation."
    )


def _forecasts(panel: Panel) -> str:
    """The worst miss of the drawn laws as forecasts, and how far ahead they were tried."""
    cuts = [(cut, f.name) for f in panel.families if f.fit is not None for cut in f.fit.held_out]
    if not cuts:
        return "" if not panel.fitted else "no law could be tried as a forecast: too few distinct sizes."
    worst, name = max(cuts, key=lambda pair: pair[0].max_error)
    far = max(cut.extrapolation for cut, _ in cuts)
    reach = f"{far:,.0f}" if far >= 10 else f"{far:.2g}"
    return (
        f"fitted below a cut, the laws missed a larger configuration by up to {worst.max_error:.2g} % ({name}, cut at "
        f"{_at(worst.cut)}); they were tried up to {reach} times beyond what they were fitted to, and not further."
    )


def _seeds(panel: Panel) -> str:
    counts = [len(run) for family in panel.families for run in family.points.runs]
    spread = np.concatenate([family.points.spread for family in panel.families])
    known = spread[np.isfinite(spread)]
    alone = sum(count == 1 for count in counts)
    if not len(known):
        return f"all {len(counts)} configurations have one seed: how much a seed moves a point is not known."
    lone = f"{alone} of {len(counts)} configurations have one seed" if alone else f"every one has {min(counts)} or more"
    return (
        f"those of one configuration differ by {np.median(known):.2g} (median standard deviation over {len(known)}); "
        f"{lone}{_best_gap(panel)}."
    )


def _best_gap(panel: Panel) -> str:
    """How far the best configurations of the two best families are apart."""
    if len(panel.families) < 2 or not panel.comparable:
        return ""
    sign = -1.0 if higher_is_better(panel.metric) else 1.0
    best = sorted((sign * float(family.points.mean[family.best]), family.name) for family in panel.families)[:2]
    (one, first), (two, second) = best
    return f"; the best of {first} and of {second} are {number(two - one, 2)} apart"


def _evaluation(panel: Panel, finished: Table) -> str:
    errors = evaluation_errors(finished, panel.metric)
    if not len(errors):
        return ""
    return (
        f"one {metric_name(panel.metric)} is known to {np.median(errors):.2g} (median standard error over the users "
        f"evaluated){_best_gap(panel)}. Trials scored on the same impressions share a part of that error."
    )


def _repeats(finished: Table) -> str:
    epochs = finished.numbers("epochs")
    more = int(np.count_nonzero(epochs > 1))
    if not more:
        return ""
    return (
        f"{more} of {len(finished)} trials pass over their data more than once (up to {np.nanmax(epochs):g} times): "
        "with more data and one pass the same compute may give another law."
    )


def _mixed(finished: Table, column: str, what: str) -> str:
    kinds = len(finished.distinct(column))
    return f"the trials mix {kinds} {what}." if kinds > 1 else ""


def _missing(part: Table, finished: int) -> str:
    lost = len(part) - finished
    return (
        f"{lost} of {len(part)} trials did not finish and take no part; had they, the laws would move." if lost else ""
    )
