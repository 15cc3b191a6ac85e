"""Datasets made in pieces: by several processes, killed and gone on with, of logs larger than the memory allowed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec_jax.config import DataConfig
from genrec_jax.data import work as making_of
from genrec_jax.data.importer import import_log
from genrec_jax.data.log import parse_mapping
from genrec_jax.data.partitions import Part
from genrec_jax.data.pieces import Pieces
from genrec_jax.data.pipeline import TrainStream
from genrec_jax.data.segments import user_hashes
from genrec_jax.data.sequences import Sequences, load
from genrec_jax.data.summary import describe
from genrec_jax.data.work import Task, making
from genrec_jax.errors import UserError
from tests.data.prepare import MEMORY, mapping, piece, prepare

ROOT = Path(__file__).parents[2]
GUARD = 300  # seconds after which a process hangs


def columns(events: int, seed: int = 0) -> dict[str, list]:
    """A log with many ties, few events of most users and a third of all of one, and features that belong to keys."""
    rng = np.random.default_rng(seed)
    user = np.where(rng.random(events) < 1 / 3, 0, rng.zipf(1.5, events) % (events // 3))
    item, time = rng.integers(0, 60, events), 10**9 + rng.integers(0, 9, events)
    return {
        "u": [f"user {u}" for u in user],
        "i": item.tolist(),
        "t": time.tolist(),
        "y": rng.integers(0, 2, events).tolist(),
        "stars": rng.integers(1, 6, events).tolist(),
        "r": [f"{u}-{t}" for u, t in zip(user, time)],
        "age": [["old", "young", None][u % 3] for u in user],
        "maker": [f"m{i % 7}" for i in item],
        "os": [["ios", "tv", None][n] for n in rng.integers(0, 3, events)],
    }


def write(folder: Path, table: dict[str, list], files: int, suffix: str = "csv") -> list[Path]:
    """The log in several files, so that a user's events are spread over them."""
    paths = []
    for number, rows in enumerate(np.array_split(np.arange(len(table["u"])), files)):
        paths.append(folder / f"part{number}.{suffix}")
        frame = pl.DataFrame({name: [values[row] for row in rows] for name, values in table.items()})
        frame.write_csv(paths[-1]) if suffix == "csv" else frame.write_parquet(paths[-1], row_group_size=97)
    return paths


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write(tmp_path_factory.mktemp("log"), columns(3000), files=3)


@pytest.fixture(scope="module")
def whole(log: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """The log's dataset made of one piece of every kind but files."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare("import", out, log, memory=1 << 28)
    return load(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Pieces made in this process, by the first word of their names."""
    found: dict[str, int] = {}
    real = Pieces.record

    def record(self, piece, result, extents):
        kind = piece.split("-")[0]
        found[kind] = found.get(kind, 0) + 1
        real(self, piece, result, extents)

    monkeypatch.setattr(Pieces, "record", record)
    return found


def test_an_import_in_many_pieces_is_the_sorted_log(log, whole, tmp_path, monkeypatch):
    """Against Python's own stable sort, and byte for byte against the import in one piece."""
    made = counted(monkeypatch)
    prepare("import", tmp_path / "out", log)
    assert min(made["segment"], made["run"], made["shard"]) >= 5
    assert content(tmp_path / "out") == content(whole.path)

    table = columns(3000)
    users = list(dict.fromkeys(table["u"]))
    order = sorted(range(3000), key=lambda row: (users.index(table["u"][row]), table["t"][row], row))
    keys = {name: pl.read_parquet(whole.path / f"keys/{name}.parquet")["key"].to_list() for name in ("users", "items")}
    assert keys["users"] == users
    assert [keys["items"][item - 1] for item in whole.item] == [table["i"][row] for row in order]
    assert (whole.time + whole.origin).tolist() == [table["t"][row] for row in order]
    assert whole.labels.tolist() == [[table["y"][row], table["stars"][row] >= 4] for row in order]
    counts = [table["u"].count(user) for user in users]
    assert np.diff(whole.offsets).tolist() == counts
    assert 1 in counts
    assert max(counts) > 900
    requests = list(dict.fromkeys(table["r"][row] for row in order))
    assert whole.request is not None
    assert whole.request.tolist() == [requests.index(table["r"][row]) for row in order]
    assert np.array_equal(whole.features["age"] == 0, [table["age"][table["u"].index(user)] is None for user in users])


def test_files_rows_and_workers_make_no_difference(log, whole, tmp_path):
    one = write(tmp_path, columns(3000), files=1, suffix="parquet")
    import_log(one, mapping(), tmp_path / "out", workers=2, memory=MEMORY // 2, chunk_rows=50, quiet=True)
    two = content(tmp_path / "out")
    said, known = json.loads(two.pop("dataset.json")), content(whole.path)
    assert said["digest"] == json.loads(known.pop("dataset.json"))["digest"]
    assert two == known


def test_the_training_stream_is_the_same(log, whole, tmp_path):
    prepare("import", tmp_path / "out", log)
    config = DataConfig(history=16, candidates=4, segments=2)
    streams = [TrainStream(data, config, "windows", batch_rows=4, seed=3) for data in (whole, load(tmp_path / "out"))]
    for _ in range(5):
        one, two = (next(stream) for stream in streams)
        for field in ("item", "time", "labels", "segment"):
            np.testing.assert_array_equal(getattr(one.history, field), getattr(two.history, field))
        np.testing.assert_array_equal(one.user, two.user)
        np.testing.assert_array_equal(one.candidates.item, two.candidates.item)
    for stream in streams:
        stream.close()


def test_a_partition_with_far_more_events_than_fit_is_sorted_in_shares():
    hashes = user_hashes([f"user {n}" for n in range(1000)])
    inside = hashes[hashes % np.uint64(5) == 3]
    held = np.stack([Part(3, 5, share, 4).holds(inside) for share in range(4)])
    assert (held.sum(axis=0) == 1).all()
    assert held.sum(axis=1).min() > 20


def test_few_users_leave_partitions_empty(tmp_path):
    table = columns(400) | {"u": ["a"] * 399 + ["b"], "age": ["old"] * 400, "r": [str(t) for t in range(400)]}
    table["t"] = list(range(400))
    prepare("import", tmp_path / "out", write(tmp_path, table, files=2), memory=10_000)
    data = load(tmp_path / "out")
    assert data.offsets.tolist() == [0, 399, 400]
    assert (data.time[:399] == np.arange(399)).all()


def test_rare_users_and_items_are_left_out_alike(tmp_path, log):
    options = {"user": "u", "item": "i", "time": "t"}
    made = []
    for memory in (MEMORY, 1 << 28):
        least = parse_mapping(**options)
        least = type(least)(**{**least.__dict__, "min_events": 40})
        data = import_log(log, least, tmp_path / str(memory), name="log", memory=memory, quiet=True)
        made.append(content(data.path))
        assert np.diff(data.offsets).min() >= 1
        assert data.users > 1
        assert data.schema.items < 61
    assert made[0] == made[1]


@pytest.mark.parametrize("memory", [MEMORY // 4, 1 << 28])
@pytest.mark.parametrize(
    ("column", "row", "value", "said"),
    [
        ("y", 1700, 7, "part1.csv, line 702: column 'y' (for label y) is 7"),
        ("i", 2900, None, "part2.csv, line 902: column 'i' (for item) has no value"),
        ("age", 2800, "newborn", "part2.csv, line 802: user feature 'age' differs"),
        ("maker", 1300, "nobody", "part1.csv, line 302: item feature 'maker' differs"),
        ("t", 2500, 10**10, "part2.csv, line 502: time is 9000000000 s after the first event"),
    ],
)
def test_bad_rows_are_named_whatever_the_pieces(tmp_path, memory, column, row, value, said):
    table = columns(3000)
    table[column][row] = value
    if column == "t":
        table["r"][row] = "alone"
    elif column in ("age", "maker"):  # of a key that was there before
        table["u"][row], table["i"][row] = table["u"][0], table["i"][0]
        table["r"][row], table["t"][row] = table["r"][0], table["t"][0]
        other = {"age": "maker", "maker": "age"}[column]
        table[other][row] = table[other][0]
    logs = write(tmp_path, table, files=3)
    with pytest.raises(UserError) as caught:
        prepare("import", tmp_path / "out", logs, memory=memory)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part0.csv", "part1.csv", "part2.csv"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.data.prepare", *map(str, arguments)]


def records(out: Path) -> dict[str, int]:
    """When each finished piece was recorded."""
    return {path.name: path.stat().st_mtime_ns for path in out.parent.glob(f".{out.name}.partial/done/*.json")}


@pytest.mark.parametrize(("what", "writes"), [("import", 160), ("world", 90)])
def test_killed_in_the_middle_of_a_write_it_goes_on_to_the_same_bytes(what, writes, log, tmp_path):
    """Finished pieces stay as they were recorded; the last run leaves what an uninterrupted one does."""
    prepare(what, tmp_path / "ref" / "out", log)
    out, rng, kills, kept = tmp_path / "out", random.Random(what), 0, {}
    while True:
        run = subprocess.run(command(what, out, *log, "--die", rng.randrange(5, writes)), cwd=ROOT, timeout=GUARD)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        assert not out.exists()
        found, kills = records(out), kills + 1
        assert {name: found.get(name) for name in kept} == kept
        kept = found
    assert kills >= 2
    assert content(out) == content(tmp_path / "ref" / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_killed_with_its_workers_at_work_it_goes_on_to_the_same_bytes(log, whole, tmp_path):
    out = tmp_path / "out"
    for target in (2, 14):
        run = subprocess.Popen(command("import", out, *log, "--workers", 2), cwd=ROOT)
        began = time.monotonic()
        while len(records(out)) < target and run.poll() is None:
            assert time.monotonic() - began < GUARD
            time.sleep(0.01)
        run.kill()
        assert run.wait(GUARD) == -signal.SIGKILL
    prepare("import", out, log)
    assert content(out) == content(whole.path)


@pytest.fixture
def unfinished(log, tmp_path) -> Path:
    """The folder of an import that was killed half-way; its dataset is ``tmp_path / "out"``."""
    run = subprocess.run(command("import", tmp_path / "out", *log, "--die", 60), cwd=ROOT, timeout=GUARD)
    assert run.returncode == -signal.SIGKILL
    return tmp_path / ".out.partial"


@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_a_damaged_piece_is_refused(unfinished, log, whole, damage):
    out, victim = unfinished.parent / "out", next(unfinished.glob("segment-*.rows"))
    if damage == "gone":
        victim.unlink()
    else:
        kept = victim.read_bytes()
        victim.write_bytes(kept[:-1] if damage == "short" else kept[:50] + bytes([kept[50] ^ 1]) + kept[51:])
    with pytest.raises(UserError) as caught:
        prepare("import", out, log)
    assert f"{victim} is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)
    prepare("import", out, log)  # begins anew
    assert content(out) == content(whole.path)


def test_a_changed_log_is_read_anew(unfinished, log, whole, tmp_path):
    (tmp_path / "new").mkdir()
    other = write(tmp_path / "new", columns(3000, seed=1), files=3)
    prepare("import", tmp_path / "out", other)
    assert load(tmp_path / "out").digest != whole.digest
    prepare("import", tmp_path / "again", other)
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_half_a_record_does_not_count(unfinished, log, whole):
    record = next(unfinished.glob("done/segment-*.json"))
    record.write_bytes(record.read_bytes()[:20])
    prepare("import", unfinished.parent / "out", log)
    assert content(unfinished.parent / "out") == content(whole.path)


def tasks(*numbers: int) -> list[Task]:
    return [Task(f"piece-{number}", (number,), 1) for number in numbers]


def test_results_come_in_order_and_the_first_error_is_raised(tmp_path):
    with making(tmp_path / "a", {}, workers=2, quiet=True) as work:
        assert [result["number"] for result in work.make("a phase", piece, tasks(2, 1, 4))] == [2, 1, 4]
    with pytest.raises(UserError, match="number 3"), making(tmp_path / "b", {}, workers=2, quiet=True) as work:
        work.make("a phase", piece, tasks(1, 3, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_worker_that_is_killed_leaves_what_was_finished(tmp_path):
    with making(tmp_path / "out", {}, workers=2, quiet=True) as work:
        work.make("first", piece, tasks(1, 2))
        with pytest.raises(ChildProcessError, match="run again"):
            work.make("second", piece, tasks(4, 5))
        assert {"piece-1.json", "piece-2.json"} <= set(records(tmp_path / "out"))


def test_one_process_at_a_time(tmp_path):
    with making(tmp_path / "out", {}, quiet=True):
        second = making(tmp_path / "out", {}, quiet=True)
        with pytest.raises(UserError, match="another process is making"):
            second.__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dataset_that_was_being_replaced_comes_back(tmp_path, whole):
    """Killed between the two renames: the old dataset lies in the work folder; the next run may have another plan."""
    folder = tmp_path / ".out.partial"
    (folder / "dataset.old").mkdir(parents=True)
    (folder / "dataset.old/dataset.json").write_text("{}")
    with pytest.raises(UserError, match="no"), making(tmp_path / "out", {}, quiet=True):
        raise UserError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_memory_does_not_grow_with_the_log(tmp_path):
    """Peaks beside what the libraries take, for 8 MiB of events at a time: 200,000 and 1,200,000 events of 40 bytes."""
    rng, peaks = np.random.default_rng(0), []
    for events in (200_000, 1_200_000):
        log = tmp_path / f"{events}.parquet"
        frame = {name: rng.integers(0, top, events) for name, top in (("u", 5000), ("i", 500), ("t", 99))}
        frame |= {"y": frame["t"] % 2, "stars": frame["t"] % 6, "r": frame["t"], "os": frame["i"] % 5}
        frame |= {"age": frame["u"] % 4, "maker": frame["i"] % 9}
        pl.DataFrame(frame).write_parquet(log, row_group_size=100_000)
        ran = subprocess.check_output(command("import", tmp_path / "out", log, "--memory", 8 << 20), cwd=ROOT)
        before, peak = map(int, ran.split())
        peaks.append(peak - before)
    assert peaks[1] < 1.25 * peaks[0]
    assert peaks[1] < 110 << 20


def test_columns_are_scanned_and_described_in_parts_alike(whole, monkeypatch):
    known = describe(whole.path)
    for events in (1, 7, 1000):
        monkeypatch.setattr("genrec_jax.data.sequences.SCAN_EVENTS", events)
        assert describe(whole.path) == known
    parts = list(whole.scan("item", "labels"))
    assert [first for first, _ in parts] == [0, 1000, 2000]
    np.testing.assert_array_equal(np.concatenate([item for _, (item, _) in parts]), whole.item)


def test_progress_tells_events_rate_and_what_was_there(unfinished, log, capsys):
    out = unfinished.parent / "out"
    import_log(log, mapping(), out, name="log", memory=MEMORY)
    said = capsys.readouterr().err
    assert "3,000 rows" in said
    assert "a second" in said
    assert "GiB of memory" in said
    assert making_of.peak_memory() > 1 << 20
