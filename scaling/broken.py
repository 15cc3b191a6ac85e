"""The power law with one smooth break (Caballero et al. 2023): y = a x^-b (1 + (x / d)^(1 / f))^(-c f).

Left of the break d it falls as x^-b, right of it as x^-(b + c); f says how wide the bend is, in units of ln x. With u
the centred ln x it is linear in three of its five parameters, ln y = p - b u - c g(u) with g = f softplus((u - m) / f),
which are solved exactly on a grid of the other two.
"""

from __future__ import annotations

import numpy as np

from scaling.table import FloatArray

_PLACES, _WIDTHS, _ZOOMS = 25, 9, 8
_SIDE = 3  # distinct x on either side of a break
_BLOCK = 4_000_000


def bend(u: FloatArray, m: FloatArray, f: FloatArray) -> FloatArray:
    """g(u), broadcast."""
    return f * np.logaddexp(0.0, (u - m) / f)


def break_range(u: FloatArray) -> tuple[float, float]:
    """Where a break may lie: at least three distinct u on either side."""
    distinct = np.unique(u)
    return float(distinct[_SIDE - 1]), float(distinct[-_SIDE])


def width_range(u: FloatArray) -> tuple[float, float]:
    """How wide a bend may be: from what no spacing of runs would tell from a kink to half of the range."""
    span = float(u.max() - u.min())
    return 0.01 * span, 0.5 * span


def solve_broken(u: FloatArray, z: FloatArray, w: FloatArray) -> dict[str, FloatArray]:
    """p, b, c, m, f (R,) of R curves ln y = z (R, n) over the same u (n,), by weighted least squares.

    A break lies in `break_range` and is as wide as `width_range` lets it be.
    """
    low, high = break_range(u)
    bounds = width_range(u)
    m = np.broadcast_to(np.linspace(low, high, _PLACES), (len(z), _PLACES))
    f = np.broadcast_to(np.geomspace(*bounds, _WIDTHS), (len(z), _WIDTHS))
    each = np.arange(len(z))
    for _ in range(_ZOOMS):
        coefficients, squares = _solved(u, z, w, m, f)
        place, width = np.unravel_index(np.argmin(squares.reshape(len(z), -1), axis=1), squares.shape[1:])
        found = coefficients[each, place, width]
        best = m[each, place], f[each, width]
        step = m[:, 1] - m[:, 0]
        near = np.clip(best[0] - step, low, high), np.clip(best[0] + step, low, high)
        m = near[0][:, None] + (near[1] - near[0])[:, None] * np.linspace(0, 1, _WIDTHS)
        ratio = f[:, 1] / f[:, 0]
        narrow, wide = np.clip(best[1] / ratio, *bounds), np.clip(best[1] * ratio, *bounds)
        f = narrow[:, None] * (wide / narrow)[:, None] ** np.linspace(0, 1, _WIDTHS)
    return {"p": found[:, 0], "b": -found[:, 1], "c": -found[:, 2], "m": best[0], "f": best[1]}


def _solved(u: FloatArray, z: FloatArray, w: FloatArray, m: FloatArray, f: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients (R, M, F, 3) of (1, u, g) at every place and width, and the sums of squares left (R, M, F)."""
    rows = max(1, _BLOCK // (m.shape[1] * f.shape[1] * len(u)))
    if len(z) > rows:
        cuts = [slice(i, i + rows) for i in range(0, len(z), rows)]
        parts = [_solved(u, z[i], w[i], m[i], f[i]) for i in cuts]
        return np.concatenate([a for a, _ in parts]), np.concatenate([b for _, b in parts])
    g = bend(u, m[:, :, None, None], f[:, None, :, None])
    weight = w[:, None, None, :]
    total = w.sum(axis=1)[:, None, None]
    # Centred, so that two unknowns remain, which Cramer's rule solves.
    mean_u, mean_z = (w @ u)[:, None, None] / total, np.sum(w * z, axis=1)[:, None, None] / total
    mean_g = np.sum(weight * g, axis=-1) / total
    du, dz, dg = u - mean_u[..., None], z[:, None, None, :] - mean_z[..., None], g - mean_g[..., None]
    uu, ug, gg = (np.sum(weight * a * b, axis=-1) for a, b in ((du, du), (du, dg), (dg, dg)))
    uz, gz, zz = (np.sum(weight * a * dz, axis=-1) for a in (du, dg, dz))
    det = uu * gg - ug**2
    sound = det > 1e-10 * uu * gg
    safe = np.where(sound, det, 1.0)
    slope = np.where(sound, (gg * uz - ug * gz) / safe, uz / uu)
    change = np.where(sound, (uu * gz - ug * uz) / safe, 0.0)
    left = zz - slope * uz - change * gz
    level = mean_z - slope * mean_u - change * mean_g
    return np.stack([level, slope, change], axis=-1), left


def derivatives(u: FloatArray, m: float, f: float) -> FloatArray:
    """d ln y (n, 5) by p, the slope, the change of slope, m and f, the last two divided by -c where c is not 0."""
    t = (u - m) / f
    steep = 1.0 / (1.0 + np.exp(-np.clip(t, -700, 700)))
    soft = np.logaddexp(0.0, t)
    return np.stack([np.ones_like(u), u, f * soft, -steep, soft - t * steep], axis=1)
