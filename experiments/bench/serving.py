"""Times scoring with cached histories (M-FALCON) against the model's own forward passes, and under concurrent requests.

Contestants run in turns in one process, so that a busy machine slows them alike; ratios are medians of the rounds'.
"""

import collections
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench.attention import Step, in_turns
from genrec_jax.batch import Shape
from genrec_jax.data.schema import Feature, Schema
from genrec_jax.models import registry
from genrec_jax.models.base import Build, ModelConfig
from genrec_jax.models.dirl import DirLConfig
from genrec_jax.models.hstu import HSTUConfig
from genrec_jax.serve import Events, Request, Scorer
from genrec_jax.serve.events import feature_shape, rows
from genrec_jax.train.evaluate import make_scorer

HISTORY = 4096  # events
CANDIDATES = (256, 1024)
MICROBATCH = 256
CONCURRENT = (1, 8, 64)
ROUNDS = 3
SIZES: dict[str, Any] = {"width": 128, "depth": 2, "heads": 2}
MODELS: dict[str, ModelConfig] = {"hstu": HSTUConfig(**SIZES), "dirl": DirLConfig(**SIZES)}
SCHEMA = Schema(
    items=20_000,
    tasks=("click", "like"),
    features=(Feature("genre", vocab=20, width=2, level="item"), Feature("country", vocab=50, width=1, level="user")),
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model with initial parameters, as a scorer and as the plain call on a whole row."""

    scorer: Scorer
    params: Any
    whole: Any  # jitted (params, Batch) -> logits

    @classmethod
    def of(cls, name: str, *, cache_bytes: int = 4 << 30) -> "Bench":
        def build(key: jax.Array) -> Any:
            return registry.build(
                MODELS[name], Build(SCHEMA, Shape(HISTORY, 1), jnp.dtype("float32")), rngs=nnx.Rngs(key)
            )

        model = nnx.eval_shape(lambda: build(jax.random.key(0)))
        params = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param)))(jax.random.key(0))
        scorer = Scorer.of(model, params, SCHEMA, HISTORY, microbatch=MICROBATCH, cache_bytes=cache_bytes)
        return cls(scorer, params, make_scorer(model))

    def forward(self, request: Request) -> jax.Array:
        """Logits of the request by one forward pass over history and candidates."""
        n = len(request.item)
        return self.whole(self.params, rows(SCHEMA, [(request, request.events)], HISTORY, slice(0, n), n, 1))


def make_request(events: int, candidates: int, user: str, seed: int = 0) -> Request:
    """A request with random items, at most a few hours after the last of ``events`` events."""
    draw = np.random.default_rng(seed)

    def items(n: int) -> dict[str, np.ndarray]:
        found = {f.name: draw.integers(0, f.vocab, feature_shape(f, n)) for f in SCHEMA.item_features}
        return {name: ids.astype(np.int32) for name, ids in found.items()}

    gaps = np.exp(3 * draw.normal(size=events + 1) + 4).clip(max=1e5)
    seconds = gaps.cumsum().astype(np.int32)
    return Request(
        item=draw.integers(1, SCHEMA.items, candidates).astype(np.int32),
        features=items(candidates),
        time=int(seconds[-1]),
        context={"country": np.array(7, np.int32)},
        events=Events(
            item=draw.integers(1, SCHEMA.items, events).astype(np.int32),
            time=seconds[:-1],
            labels=draw.integers(0, 2, (events, len(SCHEMA.tasks))).astype(np.uint8),
            request=np.zeros(events, np.int64),
            features=items(events),
        ),
        user=user,
    )


def one_request(name: str) -> Iterator[str]:
    """A cold and a warm request against one forward pass per candidate, and a warm one against one packed pass."""
    bench = Bench.of(name)
    for candidates in CANDIDATES:
        request = make_request(HISTORY, candidates, "user")
        single = dataclasses.replace(
            request, item=request.item[:1], features={key: ids[:1] for key, ids in request.features.items()}
        )

        def cold(request: Request) -> np.ndarray:
            bench.scorer.cache.pop("user")
            return bench.scorer.score(request)

        steps: dict[str, Step] = {
            "single": functools.partial(bench.forward, single),
            "cold": functools.partial(cold, request),
            "packed": functools.partial(bench.forward, request),
            "warm": functools.partial(bench.scorer.score, request),
        }
        times = in_turns(steps, ROUNDS)
        error = np.abs(np.asarray(bench.forward(request))[0] - bench.scorer.logits([request])[0]).max()
        took = {key: statistics.median(found) for key, found in times.items()}

        def ratio(slow: str, fast: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(s / f for s, f in zip(times[slow], times[fast]))

        what = f"{name}, {HISTORY:,} events, {candidates:,} candidates"
        yield (
            f"{what}: a pass per candidate {candidates} x {1e3 * took['single']:.0f} ms, M-FALCON "
            f"{1e3 * took['cold']:.0f} ms cold ({candidates * ratio('single', 'cold'):.0f}x), "
            f"{1e3 * took['warm']:.1f} ms cached ({candidates * ratio('single', 'warm'):.0f}x)"
        )
        yield (
            f"{what}: one packed pass {1e3 * took['packed']:.0f} ms, cached {1e3 * took['warm']:.1f} ms: "
            f"{ratio('packed', 'warm'):.1f}x (largest difference of a logit {error:.1e})"
        )


def concurrent(name: str, events: int = 3900, requests: int = 192) -> Iterator[str]:
    """A closed loop: so many clients, each of whom sends the next request when the last is answered.

    Every request brings one new event of its user and 256 candidates; the users' histories are cached before. The
    scorer takes up to its lanes of the requests that wait, oldest first.
    """
    bench = Bench.of(name)
    scorer = bench.scorer
    users = [make_request(events, MICROBATCH, f"user {u}", seed=u) for u in range(max(CONCURRENT))]
    for request in users:
        scorer.score(request)

    def following(request: Request) -> Request:
        last = request.events[len(request.events) - 1 :]
        event = dataclasses.replace(last, time=last.time + 60)
        return dataclasses.replace(request, events=event, time=int(event.time[0]) + 60, append=True)

    for clients in (scorer.shapes.lanes, *CONCURRENT):  # the first is for the compiler
        waiting = collections.deque((time.perf_counter(), following(users[u])) for u in range(clients))
        took: list[float] = []
        started = time.perf_counter()
        total = requests if clients > 1 else requests // 4  # one client's user has room for so many more events
        while len(took) < total:
            taken = [waiting.popleft() for _ in range(min(len(waiting), scorer.shapes.lanes))]
            scorer.score_all([request for _, request in taken])
            now = time.perf_counter()
            took += [now - sent for sent, _ in taken]
            waiting.extend((now, following(request)) for _, request in taken)
        seconds = time.perf_counter() - started
        for _, request in waiting:  # the next run goes on from here
            users[int(str(request.user).split()[1])] = request
        p50, p99 = np.percentile(took, [50, 99])
        found = f"{len(took) / seconds:.1f} requests/s, p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms"
        yield f"{name}, {events:,} cached events, one new, {MICROBATCH} candidates, {clients} at a time: {found}"


def run() -> Iterator[str]:
    for name in MODELS:
        yield from one_request(name)
    for name in MODELS:
        lines = concurrent(name)
        next(lines)
        yield from lines
