"""How often 95 % intervals hold the truth: studies simulated from known laws, fitted as a report fits them.

    python -m scaling.coverage --studies 500

A study has n runs at sizes spread evenly over its range, with log-normal noise: the same for all or, for curves, ten
times as much at the largest size as at the smallest. Of each law, the share of studies whose interval holds each
parameter, and the law's value at the largest size and at ten times its compute.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from scaling import laws
from scaling.bootstrap import bootstrap
from scaling.fit import Points, fit_form
from scaling.joint.fit import fit_joint
from scaling.joint.laws import LAWS, Model
from scaling.joint.uncertainty import resample
from scaling.table import FloatArray

CURVES: dict[str, dict[str, float]] = {
    "loglin": {"a": 1.2, "b": -0.012},
    "power": {"a": 1.6, "b": 0.02},
    "power_const": {"c": 0.6, "a": 9.0, "b": 0.16},
    "broken": {"a": 1.6, "b": 0.01, "c": 0.05, "d": 1e12, "f": 1.0},
}
JOINT: dict[str, dict[str, float]] = {
    "chinchilla": {"A": 400.0, "B": 1200.0, "E": 1.7, "alpha": 0.34, "beta": 0.33},
    "gadre": {"A": 500.0, "B": 1500.0, "E": 1.8, "alpha": 0.35},
    "history": {"A": 400.0, "B": 1200.0, "G": 0.8, "E": 1.7, "alpha": 0.34, "beta": 0.33, "gamma": 0.5},
    "data_constrained": {"A": 400.0, "B": 1200.0, "E": 1.7, "alpha": 0.34, "beta": 0.33, "R_N": 5.3, "R_D": 15.4},
}
CURVE_RUNS, JOINT_RUNS, NOISES = (6, 12, 24), (16, 49), ((0.001, 0.001), (0.01, 0.01))
UNEVEN = (0.001, 0.01)
Held = dict[str, bool]


@dataclass(frozen=True)
class Cell:
    """The share of studies of one law whose intervals hold the truth, by quantity; noise at the smallest size and the
    largest."""

    law: str
    runs: int
    noise: tuple[float, float]
    shares: Mapping[str, float]


def curve_study(form: str, runs: int, noise: tuple[float, float], rng: np.random.Generator, n_boot: int) -> Held:
    """Whether each interval of one simulated study holds the truth."""
    truth = CURVES[form]
    x = np.geomspace(1e10, 1e14, runs)
    y = curve_value(form, truth, x) * np.exp(rng.normal(0.0, np.geomspace(*noise, runs)))
    points = Points(x, tuple(np.array([value]) for value in y))
    fit = fit_form(points, form, loss=True)
    boot = bootstrap(points, fit, loss=True, n_boot=n_boot, seed=int(rng.integers(2**31)))
    assert boot is not None
    ends = np.array([1e14, 1e15])
    return _held(boot.params(), truth) | _held_at(boot.curve(ends), curve_value(form, truth, ends))


def joint_study(law: str, runs: int, noise: tuple[float, float], rng: np.random.Generator, n_boot: int) -> Held:
    """As `curve_study`, of a joint law."""
    truth, data = JOINT[law], design(law, runs)
    model = Model(LAWS[law], data)
    theta = model.theta(truth)[None]
    y = model.at(theta)[0] * np.exp(rng.normal(0.0, noise[0], len(data["n"])))
    fit = fit_joint(law, data, y, "lsq-log")
    draws = resample(fit, n_boot=n_boot, seed=int(rng.integers(2**31)))
    ends = {name: np.array([v.max(), v.max() * (np.sqrt(10.0) if name in "nd" else 1.0)]) for name, v in data.items()}
    return _held(draws.intervals(), truth) | _held_at(draws.curve(ends), model.at(theta, ends)[0])


def design(law: str, runs: int) -> dict[str, FloatArray]:
    """A grid of about as many runs, square in N and D; with two lengths of history to each, or passes over the data."""
    side = round(np.sqrt(runs))
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 3e8, side), np.geomspace(3e7, 1e10, side)))
    data = {"n": n, "d": d}
    places = np.arange(len(n)) + np.arange(len(n)) // side
    if law == "history":
        data["h"] = np.array([16.0, 64.0, 256.0, 1024.0])[places % 4]
    if law == "data_constrained":
        data["u"] = d / np.array([1.0, 4.0, 16.0, 64.0])[places % 4]
    return data


def curve_value(form: str, params: Mapping[str, float], x: FloatArray) -> FloatArray:
    """The equation as written in `laws.EQUATIONS`."""
    a, b = params["a"], params["b"]
    if form == "loglin":
        return a + b * np.log(x)
    if form == "power_const":
        return params["c"] + a * x**-b
    if form == "power":
        return a * x**-b
    return a * x**-b * (1 + (x / params["d"]) ** (1 / params["f"])) ** (-params["c"] * params["f"])


def _held(intervals: Mapping[str, tuple[float, float]], truth: Mapping[str, float]) -> Held:
    return {name: intervals[name][0] <= value <= intervals[name][1] for name, value in truth.items()}


def _held_at(limits: tuple[FloatArray, FloatArray], truth: FloatArray) -> Held:
    inside = (limits[0] <= truth) & (truth <= limits[1])
    return {"at the largest": bool(inside[0]), "10x beyond": bool(inside[1])}


def cells(studies: int, n_boot: int, seed: int, only: str | None = None) -> Iterator[Cell]:
    """Every law at every number of runs and noise."""
    grids = [(curve_study, CURVES, CURVE_RUNS), (joint_study, JOINT, JOINT_RUNS)]
    for study, truths, counts in grids:
        for law in truths:
            if only not in (None, law):
                continue
            for runs in counts:
                if runs < max(laws.FEWEST.get(law, 0), len(truths[law]) + 1):
                    continue
                for noise in (*NOISES, UNEVEN) if truths is CURVES else NOISES:
                    rng = np.random.default_rng([seed, runs, *(int(1e6 * one) for one in noise), *law.encode()])
                    held = [study(law, runs, noise, rng, n_boot) for _ in range(studies)]
                    yield Cell(law, runs, noise, {name: float(np.mean([h[name] for h in held])) for name in held[0]})


def main() -> None:
    """Print the table as it grows, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--law", choices=(*CURVES, *JOINT))
    given = parser.parse_args()
    for cell in cells(given.studies, given.draws, given.seed, given.law):
        told = "  ".join(f"{name} {share:.1%}" for name, share in cell.shares.items())
        low, high = cell.noise
        noise = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        print(f"{cell.law:>16} {cell.runs:>4} {noise:<13} {told}", flush=True)


if __name__ == "__main__":
    main()
