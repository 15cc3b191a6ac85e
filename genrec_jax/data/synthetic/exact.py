"""Random numbers and elementary functions with the same bits on every machine.

IEEE 754 fixes +, -, *, /, sqrt and scaling by powers of two to the last bit, but not exp and log, which differ between
processors and library versions; a generated world must not. So these two are built here from the former, one numpy
operation at a time (numpy never fuses two), and sums run in one fixed order.
"""

import numpy as np

_LN2 = 0.6931471805599453
# ln 2 in two parts, the first with trailing zeros: k * _LN2_HIGH is exact for |k| < 2^20 (Cody & Waite, 1980).
_LN2_HIGH = 0.69314718036912381649
_LN2_LOW = 1.90821492927058770002e-10


class Stream:
    """Uniform numbers of one purpose, from Philox keyed by (seed, index).

    The raw output of a bit generator is fixed by numpy's stream policy (NEP 19), unlike a Generator's distributions.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, index], np.uint64))

    def uniform(self, count: int) -> np.ndarray:
        """[count] float64 in (0, 1): odd multiples of 2^-41, so that adding an integer below 4096 is exact."""
        raw = self._bits.random_raw(count) >> np.uint64(24)
        return (raw.astype(np.float64) + 0.5) * 2.0**-40

    def below(self, bound: int | np.ndarray, count: int) -> np.ndarray:
        """[count] int64 in ``0..bound-1`` (bound well below 2^40, may be one per number)."""
        return (self.uniform(count) * bound).astype(np.int64)

    def normal(self, *shape: int) -> np.ndarray:
        """About standard normal, [shape]: twelve uniforms minus six (mean 0, variance 1, kurtosis 2.9)."""
        size = int(np.prod(shape))
        return (total(self.uniform(12 * size).reshape(12, size), axis=0) - 6.0).reshape(shape)


def total(values: np.ndarray, axis: int) -> np.ndarray:
    """Sum along an axis from first to last (np.sum's order may depend on the machine's vector width)."""
    return np.take(np.cumsum(values, axis=axis), -1, axis=axis)


def exp(x: np.ndarray) -> np.ndarray:
    """e^x to about 1e-15: x = k ln 2 + r, Taylor series of r to the 14th power."""
    k = np.rint(x / _LN2)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    value = np.ones_like(r)
    for power in range(14, 0, -1):
        value = value * r / power + 1.0
    return np.ldexp(value, k.astype(np.int64))


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of x > 0 to about 1e-15: x = m 2^k, log m = 2 artanh((m - 1) / (m + 1)), m about 1."""
    m, k = np.frexp(x)
    small = m < 0.7071067811865476
    m = np.where(small, 2 * m, m)
    k = np.where(small, k - 1, k).astype(np.float64)
    t = (m - 1) / (m + 1)
    square = t * t
    series = np.zeros_like(t)
    for order in range(25, 0, -2):
        series = series * square + 1.0 / order
    return 2 * t * series + k * _LN2_LOW + k * _LN2_HIGH


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + exp(-x))
