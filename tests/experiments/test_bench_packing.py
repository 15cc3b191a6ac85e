"""The benchmark of packs measures trials that may be trained as one."""

import pytest

from experiments.bench.packing import FAMILIES, TRIALS, _study
from genrec_jax.train.pack import pack_key


@pytest.mark.parametrize("family", FAMILIES)
def test_its_trials_are_one_pack(family: str) -> None:
    trials = [one.trial for one in _study(family, 3).trials("data", "small")]
    assert len({trial.hash for trial in trials}) == TRIALS
    assert len({pack_key(trial) for trial in trials}) == 1
