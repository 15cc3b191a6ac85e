"""A synthetic world with a known answer: what the best possible model would reach is computed, not estimated.

**Users.** In each of G domains (topics) the hidden state of a user at a request is h = (z, s): a type z of Z, fixed
for life, and a session interest s of S, uniform at the first request. From one request to the next s is kept with
probability ``persistence`` (or ``long_persistence``, if the gap between the two is 30 minutes or more) and is drawn
afresh, uniformly, otherwise. Gaps are seen, so time carries information. Types and interests of different domains are
independent. A user's region r shows its type in domain 0 faintly: P(r | z) = region_signal [r = z mod R] + (1 -
region_signal) / R.

**Items.** Item i has a hidden cluster c(i), which lies in domain c(i) mod G, a hidden quality q(i) and a visible,
noisy category. What is shown at a request depends on the time alone, never on the user: K independent draws from the
popularity of the period, a Dirichlet process that drifts by Poisson thinning and superposition (Lin, Grimson &
Fisher, NIPS 2010): each period an atom (an item with a weight) dies with probability ``turnover``, and as many as are
expected to die are born, with stick-breaking weights. A share ``novelty`` of the born are items never shown before;
the others bring an item back.

**Labels.** With an unseen e = -1 or +1 (a fair coin of each impression, which correlates the labels beyond h), task t
is 1 with probability sigmoid of

    base_t + affinity A_t[z, c] + interest I_t[s, c] + cross X[z, s, c] + quality q(i) + noise e.

A and I are random tables, centred over z and over s. X[z, s, c] = cross a_c(z) b_c(s) with a_c, b_c non-constant
Walsh functions (+-1, balanced): a parity. Its sum over z is zero for every (s, c), and so is its sum over s for every
(z, c), and for two clusters with different (a, b) the two parities are independent under the uniform prior. So where
the parity is the only effect, one event of an earlier session (s redrawn since), or of another cluster, says nothing
at all about the next label: it takes several events, of which some tell z and others s.

**Why history length matters.** A predictor that learns h from labels loses, over a user's whole life, no more than
the entropy of what there is to learn: G log Z nats for the types, and about G log S for each session. One domain's
few bits would be known after some tens of events; G domains, each seen in one event of G, take G times as long. So
``domains`` and ``types`` (against the strength of ``affinity``) set how far back looking pays, and ``persistence``,
``long_persistence`` and ``long_gap`` how much of it is about the present session.

**What is known of the answer.** h takes Z S values in each domain, and domains stay independent given what is seen,
so filtering gives P(h | region, labels, items, times seen) exactly, whatever window of events is seen (s is uniform
at any window's start), and p* = sum_h P(h | seen) P(y_t = 1 | h, i). :func:`truth` gives, for any evaluated
impressions,

* the Bayes NE of a history of N events: nothing that sees the last N events, the region and the request's time can be
  expected to be below it; and
* the oracle NE, given h itself.

Both in expectation over labels, mean entropy of p* over entropy of the base rate of the same rows, and realised on
the very labels a model is evaluated on. Both know c(i), q(i) and the world's tables, which a model must learn: it
reaches the floor in the limit of infinite data, except on items that were never shown before the split.

The presets' mean NE over tasks, on the test part of the time split at seed 0, in expectation:

    preset              item alone  0 events      8     64    256    all  oracle
    tiny                      .952      .952   .908   .853   .835   .835    .716
    small                     .953      .953   .913   .844   .815   .814    .713
    medium (shard 0/32)       .951      .950   .916   .869   .847   .838    .713
    large (shard 0/256)       .952      .952   .917   .866   .844   .833    .716

The 0-events column sees the region too. Popularity alone says nothing of labels: a predictor that knows only how often
an item is shown is at 1.

**Reproducible.** Every number is drawn from a counter-based generator (Philox) keyed by the seed and a block of 1024
users, so any shard can be made alone; and only operations that IEEE 754 rounds exactly are used (``exact.py``), so
that the same world has the same bits on every machine, for any number of shards and processes.
"""

from genrec_jax.data.synthetic.bayes import Truth, bayes_probabilities, oracle_probabilities, read_world, truth
from genrec_jax.data.synthetic.generate import FLOOR_HISTORIES, Floors, floors, generate
from genrec_jax.data.synthetic.world import PRESETS, World, preset

__all__ = [
    "FLOOR_HISTORIES",
    "PRESETS",
    "Floors",
    "Truth",
    "World",
    "bayes_probabilities",
    "floors",
    "generate",
    "oracle_probabilities",
    "preset",
    "read_world",
    "truth",
]
