"""The dense reference against the float64 oracle and the properties every backend keeps."""

import numpy as np

from tests.kernels.attention_cases import Case, make_inputs, oracle
from tests.kernels.attention_suite import Float64Suite, HSTUSuite


class TestReference(Float64Suite, HSTUSuite):
    implementation = "reference"


def test_the_oracle_is_differentiated_right():
    """Every gradient of the oracle along a random direction against finite differences of its output."""
    case = Case("small", (9, 4), targets=(3, 1), context_len=2)
    inputs = make_inputs(case)
    gradients = oracle(case, inputs)[1:]
    for place, gradient in zip((0, 1, 2, 4, 5), gradients, strict=True):
        direction = np.random.default_rng(place).normal(size=inputs[place].shape)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[place] = moved[place] + sign * 1e-5 * direction
            ends.append((oracle(case, moved)[0] * inputs[3]).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert abs(slope) > 1e-3
        assert abs(float((gradient * direction).sum()) - slope) < 1e-7 * max(1, abs(slope))
