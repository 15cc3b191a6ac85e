"""Draws the tiles of a small packed batch: what the work list holds, skips and need not mask.

``python -m benchmarks.tiles_figure docs/figures/attention-tiles.svg``
"""

import sys

import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from kernels_pallas.hstu_attention import Tokens, jagged_tokens, visible
from kernels_pallas.hstu_attention.tokens import attributes
from kernels_pallas.hstu_attention.worklist import tile_kinds

BLOCK = 16
SEEN, FULL, PARTIAL = "#33415c", "#9fc5e8", "#f6d8a8"


def draw(ax: Axes, tokens: Tokens, title: str) -> None:
    """One panel: the pairs a query (row) sees, over the tiles of the work list."""
    mask = np.asarray(visible(tokens))[0]
    some, full = (np.asarray(x)[0] for x in tile_kinds(*attributes(tokens), BLOCK, BLOCK))
    for q, k in zip(*np.nonzero(some)):
        face = FULL if full[q, k] else PARTIAL
        ax.add_patch(Rectangle((k * BLOCK, q * BLOCK), BLOCK, BLOCK, facecolor=face, edgecolor="white", lw=0.8))
    rows, columns = np.nonzero(mask)
    ax.scatter(columns + 0.5, rows + 0.5, s=0.55, color=SEEN, linewidths=0, rasterized=True)
    size = mask.shape[0]
    ax.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="key", ylabel="query")
    share = 100 * some.sum() / some.size
    ax.set_title(f"{title}\n{some.sum()} of {some.size} tiles ({share:.0f} %), {full.sum()} without a mask", fontsize=9)
    ax.set_xticks(range(0, size + 1, 2 * BLOCK))
    ax.set_yticks(range(0, size + 1, 2 * BLOCK))
    ax.tick_params(labelsize=7)


def main(path: str) -> None:
    offsets = jnp.array([0, 92, 128])
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.3), constrained_layout=True)
    draw(axes[0], jagged_tokens(offsets, 128), "two packed sequences, causal")
    targets = jnp.array([24, 0])
    draw(axes[1], jagged_tokens(offsets, 128, num_targets=targets, context_len=5), "5 context tokens, 24 candidates")
    draw(
        axes[2], jagged_tokens(offsets, 128, window=20, num_targets=targets, full_len=6), "window of 20, last 6 see all"
    )
    figure.legend(
        handles=[
            Patch(color=FULL, label="listed, every pair visible: no mask"),
            Patch(color=PARTIAL, label="listed, masked inside"),
            Patch(facecolor="white", edgecolor="#888888", label="not listed: never loaded"),
            Patch(color=SEEN, label="a visible pair"),
        ],
        loc="outside lower center",
        ncol=4,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main(sys.argv[1])
