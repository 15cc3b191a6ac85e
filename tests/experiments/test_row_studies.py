"""The studies of how rows are cut and thinned: their trials resolve, train, and cost what they are compared at."""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import generative, generative_tuning, stochastic_length
from experiments.study import PlannedTrial, Study
from genrec_jax.config import default_trial, override
from genrec_jax.data.sequences import Sequences
from genrec_jax.train.estimate import Account, plan_account
from genrec_jax.train.loop import train
from tests.data.helpers import random_dataset


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    return random_dataset(tmp_path_factory.mktemp("data") / "log", users=120, longest=300)


def planned(study: Study, sequences: Sequences) -> list[tuple[PlannedTrial, Account]]:
    """The trials of at most 500 steps: on so small a log, longer ones are thousands of passes to count."""
    short = [one for one in study.trials(str(sequences.path), "small") if one.trial.train.steps <= 500]
    return [(one, plan_account(one.trial)) for one in short]


def test_cuts_are_compared_at_equal_flops(sequences: Sequences) -> None:
    flops = defaultdict(set)
    targets = {}
    for one, counted in planned(generative.STUDY, sequences):
        flops[one.label].add(counted.train_flops)
        targets[one.family, one.label] = counted.targets
    assert flops.keys() == {"steps=250", "steps=500"}
    assert all(len(found) == 1 for found in flops.values())
    assert flops["steps=250"] != flops["steps=500"]
    for label in flops:
        assert targets["impressions", label] == targets["impressions 1/n", label]
        assert min(targets["windows", label], targets["prefixes 1/n", label]) > 10 * targets["impressions", label]


def test_a_smaller_alpha_makes_a_pass_cheaper(sequences: Sequences) -> None:
    flops = {(one.family, one.label): c.train_flops for one, c in planned(stochastic_length.STUDY, sequences)}
    labels = {label for _, label in flops}
    assert len(labels) == 4
    for label in labels:
        by_alpha = [flops[name, label] for name in ("whole", "alpha 1.9", "alpha 1.8", "alpha 1.6")]
        assert by_alpha == sorted(by_alpha, reverse=True)
        same = [flops[f"alpha 1.6{how}", label] for how in ("", " place", " uniform", " recent")]
        assert len(set(same)) == 1  # how events are chosen costs nothing


def test_recipes_are_what_the_tuning_tried(sequences: Sequences) -> None:
    """A rate that the grid has inside its ends, and the very trial of the study at the grid's budget."""
    tried = [one.trial for one in generative_tuning.STUDY.trials(str(sequences.path), "small")]
    assert all(rate in generative_tuning.LEARNING_RATES[1:-1] for rate in generative.RATES.values())
    chosen = [one.trial for one in generative.STUDY.trials(str(sequences.path), "small")]
    middle = [trial for trial in chosen if trial.train.steps == 1000]
    assert len(middle) == 4
    for trial in middle:
        assert replace(trial, train=replace(trial.train, report_test=False)) in tried


@pytest.mark.parametrize("name", generative.CUTS)
def test_every_cut_is_trained(sequences: Sequences, tmp_path: Path, name: str) -> None:
    """A trial of each, from the first step to its result."""
    small = {"data.path": str(sequences.path), "model.width": 8, "model.depth": 1, "data.history": 8, "train.steps": 2}
    trial = override(default_trial("hstu"), {**generative.BASE, **generative.CUTS[name], **small})
    result = train(trial, tmp_path / "trial")
    assert result["status"] == "done"
    assert math.isfinite(result["ne"])
