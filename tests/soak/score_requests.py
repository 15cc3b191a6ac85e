"""Scores 100,000 requests, one in a hundred malformed, in a small cache, and kills the command once on the way.

    python -m tests.soak.score_requests [REQUESTS] [SEED]

Users come and go with whole histories, longer ones, increments and new contexts; malformed rows are of every kind the
decoder knows. The cache holds a few dozen of the users. Checked: every good row is scored and every malformed one is
counted; the cache stays within its budget (`UserCache`, after each call) and resident memory stops growing after the
first tenth; rows whose user sends the whole history again agree with a scorer that has seen nothing else; a killed
command leaves no output, and the next one writes what an undisturbed one writes, bit for bit. About twenty minutes on
two cores; too long for the suite.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.score import score_command
from genrec_jax.config import default_trial, override
from genrec_jax.data.sequences import digest_of
from genrec_jax.serve import Scorer, UserCache
from genrec_jax.serve.records import decode
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import init_params
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.record import write_json
from genrec_jax.train.step import init_state
from tests.data.helpers import random_dataset

USERS, MALFORMED, CACHE_MIB = 400, 0.01, 1
SETTINGS = {"data.history": 32, "model.width": 16, "model.depth": 2, "model.heads": 2}


def make_trial(root: Path) -> Path:
    sequences = random_dataset(root / "data")
    path = str(sequences.path)
    trial = override(default_trial("dirl", path=path, digest=digest_of(path)), SETTINGS)
    folder = root / "trial"
    folder.mkdir()
    write_json(folder / "config.json", trial.to_json())
    state = init_state(init_params(trial, sequences.schema), make_optimizer(trial.train, 1), trial.seed)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        checkpoints.save(0, state, {})
    return folder


def spoil(record: dict[str, Any], draw: random.Random) -> str:
    """A malformed line made of a good one."""
    events = record.get("history") or record.get("append") or []
    kinds = [
        lambda: record.update(candidates=[10**6]),
        lambda: record.update(time="now"),
        lambda: record.update(time=float("nan")),
        lambda: record.update(time=-1),
        lambda: record.update(histroy=[]),
        lambda: record.pop("candidates"),
        lambda: record.update(context={"country": "nowhere"}),
        lambda: record.update(append=[], history=[]),
        lambda: record.update(user="never seen", append=record.pop("history", record.get("append", []))),
    ]
    if events:
        kinds += [
            lambda: events[-1].pop("labels"),
            lambda: events[-1].update(labels={"click": 1}),
            lambda: events[-1].update(labels={"click": 1, "like": 2}),
            lambda: events[-1].update(time=record["time"] + 1),
            lambda: events[-1].update(item=0),
        ]
    kind = draw.randrange(len(kinds) + 1)
    if kind == len(kinds):
        return json.dumps(record)[: draw.randrange(1, 10)]
    kinds[kind]()
    return json.dumps(record)


def stream(requests: int, items: int, draw: random.Random) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(line, the same request with its user's whole history, or None for a malformed line)."""
    histories: dict[int, list[dict[str, Any]]] = {}
    contexts: dict[int, dict[str, int]] = {}
    recent: list[int] = []
    now = 1000
    for _ in range(requests):
        now += draw.randrange(1, 50)
        user = draw.choice(recent) if recent and draw.random() < 0.5 else draw.randrange(USERS)
        known = histories.get(user, [])
        new = [
            {
                "item": draw.randrange(1, items),
                "time": now - 1,
                "labels": {"click": draw.randrange(2), "like": draw.randrange(2)},
            }
            for _ in range(draw.choice((0, 1, 1, 2, 20)))
        ]
        if user not in contexts or draw.random() < 0.02:
            contexts[user] = {"country": draw.randrange(9), "device": draw.randrange(9)}
        whole = {
            "user": user,
            "time": now,
            "context": contexts[user],
            "history": (known + new)[-40:],
            "candidates": [draw.randrange(1, items) for _ in range(draw.randrange(12))],
        }
        record = json.loads(json.dumps(whole))
        if user in recent[-8:] and draw.random() < 0.8:  # surely not forgotten
            record["append"] = json.loads(json.dumps(new))
            del record["history"]
        if draw.random() < MALFORMED:
            yield spoil(record, draw), None
            continue
        histories[user] = whole["history"]
        recent = [*[u for u in recent if u != user], user][-16:]
        yield json.dumps(record), whole


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(requests: int, seed: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        trial = make_trial(root)
        items = Scorer.from_trial(trial).schema.items
        good: dict[int, dict[str, Any]] = {}
        with (root / "in.jsonl").open("w") as file:
            for number, (line, whole) in enumerate(stream(requests, items, draw), 1):
                file.write(line + "\n")
                if whole is not None:
                    good[number] = whole
        memory: list[float] = []
        largest = _watch_the_cache(memory)
        options = {"skip_bad": True, "quiet": True, "microbatch": 8, "cache_mib": CACHE_MIB, "cache_type": "float32"}
        started = time.perf_counter()
        score_command(trial, root / "in.jsonl", root / "out.jsonl", **options)
        seconds = time.perf_counter() - started
        rows = [json.loads(line) for line in (root / "out.jsonl").open()]
        assert [row["row"] for row in rows] == list(good), "good rows are missing, or malformed ones scored"
        print(f"{len(rows):,} scored, {requests - len(rows):,} malformed, {requests / seconds:,.0f} requests/s")
        print(f"cache: at most {max(largest):,} bytes of {CACHE_MIB << 20:,}")
        assert max(largest) <= CACHE_MIB << 20
        assert max(largest) > 0.9 * (CACHE_MIB << 20), "the cache was never full"
        tenths = [max(part) for part in np.array_split(memory, 10)]
        print("resident MiB, largest of each tenth:", " ".join(f"{x:.0f}" for x in tenths))
        assert tenths[-1] < tenths[0] + 32, "memory grows"
        _agree(trial, rows, good)
        _killed(trial, root)
    print("all as documented")


def _watch_the_cache(memory: list[float]) -> list[int]:
    """Notes, from now on, the bytes of the cache and this process's memory after each entry."""
    largest: list[int] = []
    put = UserCache.put

    def watched(self: UserCache, *args: Any) -> None:
        put(self, *args)
        largest.append(self.nbytes)
        if len(largest) % 100 == 0:
            memory.append(resident())

    UserCache.put = watched
    return largest


def _agree(trial: Path, rows: list[dict[str, Any]], good: dict[int, dict[str, Any]]) -> None:
    """Whole histories, without a cache, give the scores that whatever was cached gave."""
    scorer, worst = Scorer.from_trial(trial, microbatch=8, cache_bytes=0), 0.0
    for row in rows[:: max(1, len(rows) // 500)]:
        scores = scorer.score(decode(good[row["row"]], scorer.catalogue))
        got = np.array([row["scores"][task] for task in scorer.schema.tasks]).T.reshape(scores.shape)
        worst = max(worst, float(np.abs(got - scores).max(initial=0)))
    print(f"against whole histories without a cache: largest difference of a probability {worst:.1e}")
    assert worst <= 1e-6


def _killed(trial: Path, root: Path) -> None:
    """Killed on the way, then started again."""
    command = [sys.executable, "-m", "experiments.cli", "score", str(trial), "--requests", str(root / "in.jsonl")]
    command += ["--out", str(root / "again.jsonl"), "--skip-bad", "--quiet", "--microbatch", "8"]
    command += ["--cache-mib", str(CACHE_MIB)]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(root.glob(".again.jsonl.*")):
        time.sleep(0.1)
    time.sleep(5)
    assert first.poll() is None, "the command ended before it could be killed"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (root / "again.jsonl").exists()
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
    assert (root / "again.jsonl").read_bytes() == (root / "out.jsonl").read_bytes()
    print("killed and started again: the same bytes")


if __name__ == "__main__":
    given = [int(x) for x in sys.argv[1:]]
    main(*(given + [100_000, 0][len(given) :]))
