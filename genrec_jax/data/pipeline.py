"""The input pipeline: an endless, resumable stream of training batches, and the fixed batches of an evaluation.

Batch number i of a stream is a pure function of (dataset, configuration, seed, i): which rows a pass holds, how they
are packed and in which order they come can be computed for any pass (``passes.py``). So the whole state of the iterator
is i, whatever the number of workers, and grain only has to map a range of integers ahead of the training step.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from genrec_jax.batch import Batch, Shape
from genrec_jax.config import DataConfig
from genrec_jax.data import rows as row_tables
from genrec_jax.data.packing import EMPTY, Assembler, plan_segments
from genrec_jax.data.passes import Passes
from genrec_jax.data.rows import RowTable
from genrec_jax.data.sequences import Sequences
from genrec_jax.data.splits import Part, Split, kept_users, split_by_time, split_by_users, split_last
from genrec_jax.errors import UserError
from genrec_jax.models.base import Goal, Rows

_THREADS = 2  # per process; numpy's gathers hold the GIL, so more threads only take turns
_AHEAD = 4  # chunks kept ready per process
_CHUNK_ROWS = 512  # rows gathered at once, fewer if they hold more events than this:
_CHUNK_EVENTS = 1 << 16
_ENDLESS = 1 << 60


class TrainStream:
    """Endless iterator of training batches: pass after pass over the rows, each in its own order.

    Passes follow one another without a seam: a batch may end one and begin the next, so no row is ever dropped and a
    dataset smaller than one batch works (its rows then repeat within the batch); see `Passes` for packing by the batch.

    passes: what each of them holds.
    """

    def __init__(
        self,
        sequences: Sequences,
        config: DataConfig,
        kind: Rows,
        batch_rows: int,
        seed: int,
        share: slice | None = None,
    ):
        """Cuts and packs the rows. ``kind`` "users" splits by last events, the others by time. ``share``: which rows of
        a batch are delivered, for a process that works on these alone; None for all.

        Raises UserError naming the dataset if a part is empty or no training row is left.
        """
        split = _last_split(sequences, config) if kind == "users" else _ranking_split(sequences, config)
        kept = kept_users(sequences.users, config.fraction)
        table = row_tables.training_rows(kind, sequences, split, kept, config.history, config.candidates)
        if not len(table):
            raise UserError(
                f"dataset {sequences.name!r} has no training rows of kind {kind!r} with data.fraction {config.fraction}"
            )
        self._sequences, self._table, self._kind = sequences, table, kind
        self.passes = Passes(kind, table, config, batch_rows, seed)
        batches = max(1, min(_CHUNK_ROWS, _CHUNK_EVENTS // config.history) // batch_rows)
        assembler = Assembler(sequences, table, config.shape, self.passes.thinning)
        self._make = _ChunkAt(assembler, self.passes, batch_rows, batches, share or slice(0, batch_rows))
        self._workers = config.workers
        self._identity: dict[str, int | float | str] = {
            "rows": int(self.passes[0].tally.rows),
            "batch_rows": batch_rows,
            "seed": seed,
            "dataset": sequences.digest,
            "packing": config.packing,
            "stochastic_length": config.stochastic_length,
            "subsequence": config.subsequence,
            "rows_per_user": config.rows_per_user,
        }
        self._next = 0
        self._chunks: Any = None
        self._ready: collections.deque[Batch] = collections.deque()

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if self._chunks is None:
            chunk, inside = divmod(self._next, self._make.batches)
            self._chunks = iter(_prefetched(self._make, chunk, self._workers))
            self._ready.extend(self._make.split(next(self._chunks))[inside:])
        if not self._ready:
            self._ready.extend(self._make.split(next(self._chunks)))
        self._next += 1
        return self._ready.popleft()

    def target_counts(self) -> np.ndarray:
        """[items] int64: how often each item is a supervised target in one pass."""
        events = row_tables.target_events(self._kind, self._table)
        return np.bincount(np.asarray(self._sequences.item)[events], minlength=self._sequences.schema.items)

    def seen_items(self) -> np.ndarray:
        """[items] bool: whether any training row holds the item, as history or as a candidate."""
        table, events = self._table, self._sequences.events
        # Rows are ranges of events: +1 where one begins, -1 where it ends.
        edges = np.zeros(events + 1, np.int64)
        for start, stop in ((table.history_start, table.history_stop), (table.target_start, table.target_stop)):
            np.add.at(edges, start, 1)
            np.add.at(edges, stop, -1)
        seen = np.zeros(self._sequences.schema.items, bool)
        seen[np.asarray(self._sequences.item)[np.cumsum(edges[:-1]) > 0]] = True
        return seen

    def get_state(self) -> dict[str, int | float | str]:
        """JSON-serialisable state: the batches delivered so far, and what they were cut from."""
        return {"batch": self._next, **self._identity}

    def set_state(self, state: Mapping[str, int | float | str]) -> None:
        """Continues after the batch at which ``get_state`` was called, with any number of workers.

        Raises UserError if the state comes from a stream of other data, rows, batch size or seed.
        """
        theirs = {key: state.get(key) for key in self._identity}
        if theirs != self._identity:
            raise UserError(f"the checkpoint's data stream was {theirs}, this one is {self._identity}")
        self.close()
        self._next = int(state["batch"])

    def close(self) -> None:
        """Stops the workers; iterating again restarts them where they were."""
        if self._chunks is not None:
            self._chunks.close()
        self._chunks = None
        self._ready.clear()


@dataclasses.dataclass(frozen=True)
class _ChunkAt:
    """Chunk number i of a stream: the ``share`` of ``batches`` consecutive batches, gathered at once.

    One gather over several hundred rows costs little more than one over a few dozen: the calls cost, not the bytes.
    A chunk travels whole: a worker process hands over every array under a file descriptor of its own.
    """

    assemble: Assembler
    passes: Passes
    batch_rows: int
    batches: int
    share: slice

    def __call__(self, index: int) -> Batch:
        rows = self.batches * self.batch_rows
        position = int(index) * rows + np.arange(rows)
        parts, at = [], 0
        for epoch, plan in self.passes.at(position):
            own = plan[self._shared(np.arange(at, at + len(plan)))]
            at += len(plan)
            if len(own):
                parts.append(self.assemble(own, epoch))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _shared(self, row: np.ndarray) -> np.ndarray:
        """Which rows of a chunk are in the share: bool, as ``row``."""
        inside = row % self.batch_rows
        return (self.share.start <= inside) & (inside < self.share.stop)

    def split(self, chunk: Batch) -> list[Batch]:
        """The chunk's batches, in order, as views."""
        rows = self.share.stop - self.share.start
        starts = range(0, self.batches * rows, rows)
        return [jax.tree.map(lambda x, at=at: x[at : at + rows], chunk) for at in starts]


def _prefetched(make: _ChunkAt, start: int, workers: int) -> Any:
    """Grain's iterable of chunks from number ``start`` on, made ahead by threads, or by ``workers`` processes."""
    # Imported here: only a stream that delivers batches needs them, and a model's cost or step needs no stream.
    import grain
    from absl import flags

    chunks = grain.MapDataset.range(start, _ENDLESS).map(make)
    ahead = chunks.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD))
    if not workers:
        return ahead
    if not flags.FLAGS.is_parsed():
        # Grain asks absl's flags how its workers shall run; outside an absl application (and under pytest) nobody has
        # parsed them, and asking raises. Their defaults are what is wanted.
        flags.FLAGS.mark_as_parsed()
    return ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD))


def evaluation_shape(config: DataConfig, goal: Goal) -> Shape:
    """Of the rows that are evaluated: a ranker's hold one request each, a retriever's are packed as in training."""
    return dataclasses.replace(config.shape, segments=config.segments if goal == "retrieval" else 1)


class FixedBatches:
    """Batches of given rows in their order, which can be iterated again and again; the last is filled up with empty
    rows.

    ``plan`` [R, S]: the rows of the assembler's table that share each row.
    """

    def __init__(self, assemble: Assembler, plan: np.ndarray, batch_rows: int):
        self._assemble = assemble
        self._plan = np.full((-(-len(plan) // batch_rows) * batch_rows, plan.shape[1]), EMPTY, np.int64)
        self._plan[: len(plan)] = plan
        self._batch_rows = batch_rows

    def __len__(self) -> int:
        return len(self._plan) // self._batch_rows

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._plan), self._batch_rows):
            yield self._assemble(self._plan[start : start + self._batch_rows])


def request_batches(sequences: Sequences, config: DataConfig, table: RowTable, batch_rows: int) -> FixedBatches:
    """Batches of the requests in ``table``, one per row, as they are evaluated."""
    assemble = Assembler(sequences, table, evaluation_shape(config, "ranking"))
    return FixedBatches(assemble, np.arange(len(table))[:, None], batch_rows)


class EvaluationBatches(FixedBatches):
    """Batches of the impressions that every model is evaluated on.

    impressions: how many candidates they hold. fingerprint: see :func:`evaluation_fingerprint`.
    """

    def __init__(self, sequences: Sequences, config: DataConfig, goal: Goal, part: Part, batch_rows: int):
        table = _evaluation_table(sequences, config, goal, part)
        self.impressions = table.candidates
        self.fingerprint = _fingerprint(sequences, part, table)
        self._items = np.asarray(sequences.item)[_targets(table)]
        shape = evaluation_shape(config, goal)
        plan = plan_segments(table.history_length, config.history, shape.segments, seed=0)
        super().__init__(Assembler(sequences, table, shape), plan, batch_rows)

    def unseen(self, seen: np.ndarray) -> int:
        """How many of the impressions are of items that ``seen`` [items] has not."""
        return int((~seen[self._items]).sum())


def evaluation_batches(
    sequences: Sequences, config: DataConfig, goal: Goal, part: Part, batch_rows: int
) -> EvaluationBatches:
    """Batches over the part's fixed impressions; the last is padded with empty rows.

    Ranking: the part's requests, at most ``eval_impressions`` candidates, one request per row. Retrieval: the part's
    held-out event of at most that many users, in the first slot of their segment; rows are packed by ``segments``. The
    choice depends on the dataset, the split and K, never on N, the model, the packing or a
    seed. Raises UserError naming the dataset and the part if it is empty.
    """
    return EvaluationBatches(sequences, config, goal, part, batch_rows)


def evaluation_fingerprint(sequences: Sequences, config: DataConfig, goal: Goal, part: Part) -> str:
    """Twelve hex digits that say which impressions are evaluated: equal digits, comparable results.

    Hashes the dataset's content (not its name), the part, and for each row the event indices of its candidates and of
    its request's first event. So it depends on K, which cuts requests into rows, but not on N, the model or a seed.
    """
    return _fingerprint(sequences, part, _evaluation_table(sequences, config, goal, part))


def evaluation_events(
    sequences: Sequences, config: DataConfig, goal: Goal, part: Part
) -> tuple[np.ndarray, np.ndarray]:
    """The evaluated impressions: event indices [M] and, for each, the event at which its request begins [M], int64."""
    rows = _evaluation_table(sequences, config, goal, part)
    return _targets(rows), np.repeat(rows.history_stop, rows.target_stop - rows.target_start)


def _targets(rows: RowTable) -> np.ndarray:
    """Event indices [M] of the candidates of all rows."""
    counts = rows.target_stop - rows.target_start
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(rows.target_start, counts) + within


def _evaluation_table(sequences: Sequences, config: DataConfig, goal: Goal, part: Part) -> RowTable:
    if goal == "retrieval":
        rows = row_tables.next_item_rows(sequences, _last_split(sequences, config), part, config.history)
    else:
        split = _ranking_split(sequences, config)
        rows = row_tables.request_rows(sequences, split, part, config.history, config.candidates)
    return row_tables.evaluation_rows(rows, config.eval_impressions)


def _fingerprint(sequences: Sequences, part: Part, rows: RowTable) -> str:
    digest = hashlib.sha256(f"{sequences.digest} {part}".encode())
    for column in (rows.history_stop, rows.target_start, rows.target_stop):
        digest.update(np.ascontiguousarray(column, "<i8").tobytes())
    return digest.hexdigest()[:12]


def _last_split(sequences: Sequences, config: DataConfig) -> Split:
    return split_last(sequences, validation=config.protocol == "honest")


def _ranking_split(sequences: Sequences, config: DataConfig) -> Split:
    split = split_by_time if config.split == "time" else split_by_users
    return split(sequences, config.validation, config.test)
