"""What the importer makes of good logs, against hand-computed answers."""

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec_jax.data.importer import import_log
from genrec_jax.data.log import Label, LogMapping, parse_label, parse_mapping, read_mapping
from genrec_jax.data.sequences import Sequences
from genrec_jax.data.summary import describe, summary_table
from genrec_jax.errors import UserError

PLAIN = {"user": "u", "item": "i", "time": "t"}


def write(path: Path, columns: dict) -> Path:
    frame = pl.DataFrame(columns)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


def imported(tmp_path: Path, columns: dict, chunk_rows: int = 1 << 18, **mapping) -> Sequences:
    log = write(tmp_path / "log.parquet", columns)
    return import_log([log], parse_mapping(**PLAIN, **mapping), tmp_path / "out", quiet=True, chunk_rows=chunk_rows)


def keys(data: Sequences, name: str) -> list:
    return pl.read_parquet(data.path / f"keys/{name}.parquet")["key"].to_list()


def arrays(data: Sequences) -> dict[str, np.ndarray]:
    """Every array of the dataset folder by relative path, keys included."""
    found = {str(p.relative_to(data.path)): np.load(p) for p in data.path.rglob("*.npy")}
    tables = {p: pl.read_parquet(p) for p in data.path.rglob("*.parquet")}
    return found | {str(p.relative_to(data.path)): table["key"].to_numpy() for p, table in tables.items()}


LOG = {
    "u": ["b", "a", "b", "a", "b", "c"],
    "i": [30, 10, 10, 20, 40, 30],
    "t": [105, 120, 100, 110, 105, 100],
    "like": [1, 0, 0, 1, 1, 0],
    "stars": [5, 3, None, 4, 5, 1],
    "os": ["ios", "web", None, "web", "ios", "tv"],
}


@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 1000])
def test_sorts_by_user_then_time_then_file_order(tmp_path, chunk_rows):
    data = imported(
        tmp_path, LOG, chunk_rows, labels=["like=like", "love=stars==5", "good=stars>=4"], event_features=["os=os"]
    )
    assert keys(data, "users") == ["b", "a", "c"]  # order of first appearance
    assert keys(data, "items") == [30, 10, 20, 40]
    assert data.offsets.tolist() == [0, 3, 5, 6]
    assert data.item.tolist() == [2, 1, 4, 3, 2, 1]
    assert data.time.tolist() == [0, 5, 5, 10, 20, 0]
    assert data.origin == 100
    assert data.schema.tasks == ("like", "love", "good")
    assert data.labels.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert data.features["os"].tolist() == [0, 1, 1, 2, 2, 3]
    assert keys(data, "features/os") == ["ios", "web", "tv"]
    assert data.schema.items == 5
    assert data.schema.features[0].vocab == 4
    assert data.request is None
    assert (data.item.dtype, data.time.dtype, data.labels.dtype) == (np.int32, np.int32, np.uint8)
    assert not (data.path / "spool").exists()


def test_order_column_breaks_ties_before_file_order(tmp_path):
    columns = {"u": [1, 1, 1], "i": [7, 8, 9], "t": [5, 5, 4], "pos": [1, 0, 9]}
    assert imported(tmp_path, columns, order="pos").item.tolist() == [3, 2, 1]


def test_ties_keep_the_order_of_the_lines_over_chunks_and_files(tmp_path):
    """Thousands of ties against a stable sort; a quicksort of the same times, as the public HSTU code's, moves them."""
    rng = np.random.default_rng(0)
    user, time = rng.integers(1, 4, 6000), rng.integers(0, 3, 6000)
    files = []
    for part in np.split(np.arange(6000), [2500]):
        files.append(tmp_path / f"{len(files)}.parquet")
        pl.DataFrame({"u": user[part], "i": part, "t": time[part]}).write_parquet(files[-1])
    data = import_log(files, parse_mapping(**PLAIN), tmp_path / "out", quiet=True, chunk_rows=700)
    owners = keys(data, "users")
    stable = sorted(range(6000), key=lambda event: (owners.index(user[event]), time[event]))
    assert np.array_equal(np.asarray(keys(data, "items"))[data.item - 1], stable)
    own = np.flatnonzero(user == owners[0])
    assert not np.array_equal(own[np.argsort(time[own])], stable[: len(own)])


def test_integer_keys_stay_integers_and_text_keys_stay_text(tmp_path):
    data = imported(tmp_path, {"u": ["7", "8"], "i": [-3, 2**40], "t": [0, 0]})
    assert keys(data, "users") == ["7", "8"]
    assert keys(data, "items") == [-3, 2**40]


def test_leading_zeros_keep_keys_apart(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("u,i,t\n07,1,0\n7,1,0\n")
    data = import_log([log], parse_mapping(**PLAIN), tmp_path / "out", quiet=True)
    assert keys(data, "users") == ["07", "7"]


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_time_units_are_floored_to_seconds_but_sort_exactly(tmp_path, unit, scale):
    times = [20 * scale + scale - 1, 20 * scale, 30 * scale]
    data = imported(tmp_path, {"u": [1, 1, 1], "i": [1, 2, 3], "t": times}, time_unit=unit)
    assert data.origin == 20
    assert data.time.tolist() == [0, 0, 10]
    assert data.item.tolist() == ([1, 2, 3] if scale == 1 else [2, 1, 3])


def test_date_time_columns_carry_their_unit(tmp_path):
    times = pl.Series([1_500_000_500, 1_500_000_000]).cast(pl.Datetime("ms"))
    data = imported(tmp_path, {"u": [1, 1], "i": [1, 2], "t": times}, time_unit="ns")
    assert data.origin == 1_500_000
    assert data.item.tolist() == [2, 1]


def test_whole_floats_are_times_and_booleans_are_labels(tmp_path):
    columns = {"u": [1, 1], "i": [1, 2], "t": [3.0, 2.0], "y": [True, False]}
    data = imported(tmp_path, columns, labels=["y=y"])
    assert data.time.tolist() == [0, 1]
    assert data.labels.tolist() == [[0], [1]]


def test_without_labels_tasks_are_empty(tmp_path):
    data = imported(tmp_path, {"u": [1, 1], "i": [1, 2], "t": [3, 2]})
    assert data.schema.tasks == ()
    assert data.labels.shape == (2, 0)
    assert describe(data.path)["tasks"] == {}


@pytest.mark.parametrize("chunk_rows", [1, 100])
def test_requests_are_numbered_along_the_sorted_log(tmp_path, chunk_rows):
    columns = {
        "u": ["b", "a", "b", "a", "b"],
        "i": [1, 2, 3, 4, 5],
        "t": [9, 5, 2, 5, 9],
        "r": ["x", "x", "y", "x", "x"],  # two users share the id x: two requests
    }
    data = imported(tmp_path, columns, chunk_rows, request="r")
    assert data.item.tolist() == [3, 1, 5, 2, 4]
    assert data.request.tolist() == [0, 1, 1, 2, 2]


def test_user_and_item_features_from_the_log(tmp_path):
    columns = {
        "u": [1, 2, 1],
        "i": [5, 5, 6],
        "t": [1, 1, 2],
        "sex": ["f", None, "f"],
        "brand": ["x", "x", "y"],
    }
    data = imported(tmp_path, columns, user_features=["sex=sex"], item_features=["brand=brand"])
    assert data.features["sex"].tolist() == [1, 0]
    assert data.features["brand"].tolist() == [0, 1, 2]
    assert [(f.name, f.level, f.vocab, f.width) for f in data.schema.features] == [
        ("sex", "user", 2, 1),
        ("brand", "item", 3, 1),
    ]


def side_tables(folder: Path) -> Path:
    (folder / "items.csv").write_text("id,tags,maker\n9,x|y,acme\n20,,\n10,z|x|w,acme\n30,y,bolt\n40,x,\n")
    write(folder / "users.parquet", {"id": ["a", "z", "b"], "age": [30, 40, 30]})
    mapping = folder / "mapping.toml"
    mapping.write_text(
        'user = "u"\nitem = "i"\ntime = "t"\nlabels = ["love=stars==5"]\nevent_features = ["os=os"]\n'
        '[[table]]\nlevel = "item"\nfile = "items.csv"\nkey = "id"\nfeatures = ["tags=tags[|]", "maker=maker"]\n'
        '[[table]]\nlevel = "user"\nfile = "users.parquet"\nkey = "id"\nfeatures = ["age=age"]\n'
    )
    return mapping


def test_side_tables_join_by_key_and_the_item_table_is_the_catalogue(tmp_path):
    log = write(tmp_path / "log.parquet", LOG)
    data = import_log([log], read_mapping(side_tables(tmp_path)), tmp_path / "out", quiet=True)
    assert keys(data, "items") == [9, 20, 10, 30, 40]  # the table's order, with the item that has no event
    assert data.item.tolist() == [3, 4, 5, 2, 3, 4]
    assert data.features["tags"].tolist() == [[0, 0, 0], [1, 2, 0], [0, 0, 0], [3, 1, 4], [2, 0, 0], [1, 0, 0]]
    assert data.features["maker"].tolist() == [0, 1, 0, 1, 2, 0]
    assert data.features["age"].tolist() == [1, 1, 0]  # users b, a, and c, which the table lacks
    assert [(f.name, f.vocab, f.width) for f in data.schema.features] == [
        ("os", 4, 1),
        ("tags", 5, 3),
        ("maker", 3, 1),
        ("age", 3, 1),
    ]


def test_several_files_are_one_log_in_the_order_given(tmp_path):
    whole = imported(tmp_path, LOG, labels=["like=like"])
    parts = [{k: v[:2] for k, v in LOG.items()}, {k: v[2:] for k, v in LOG.items()}]
    files = [write(tmp_path / f"part{n}.parquet", part) for n, part in enumerate(parts)]
    mapping = parse_mapping(**PLAIN, labels=["like=like"])
    split = import_log(files, mapping, tmp_path / "split", quiet=True)
    np.testing.assert_equal(arrays(split), arrays(whole))
    assert json.loads((split.path / "dataset.json").read_text())["source"]["files"] == [
        "part0.parquet",
        "part1.parquet",
    ]


def big_log(rows: int) -> dict:
    rng = random.Random(1)
    return {
        "u": [rng.randrange(40) for _ in range(rows)],
        "i": [rng.randrange(200) for _ in range(rows)],
        "t": [rng.randrange(500) + 10**9 for _ in range(rows)],
        "y": [rng.random() < 0.3 for _ in range(rows)],
        "c": [rng.choice(["é", "b c", 'q"x', "a,b", None]) for _ in range(rows)],
    }


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 10**6])
def test_formats_and_chunks_give_identical_datasets(tmp_path, suffix, chunk_rows):
    columns = big_log(300)
    options = {"labels": ["y=y"], "event_features": ["c=c"]}
    reference = imported(tmp_path, columns, **options)
    log = write(tmp_path / f"other{suffix}", columns)
    mapping = parse_mapping(**PLAIN, **options)
    data = import_log([log], mapping, tmp_path / "other", quiet=True, chunk_rows=chunk_rows)
    np.testing.assert_equal(arrays(data), arrays(reference))


def test_agrees_with_an_independent_sort(tmp_path):
    columns = big_log(2000)
    data = imported(tmp_path, columns, chunk_rows=128, labels=["y=y"])
    users, items = keys(data, "users"), keys(data, "items")
    rows = sorted(range(2000), key=lambda r: (users.index(columns["u"][r]), columns["t"][r], r))
    assert [items[i - 1] for i in data.item] == [columns["i"][r] for r in rows]
    assert (data.time + data.origin).tolist() == [columns["t"][r] for r in rows]
    assert data.labels[:, 0].tolist() == [columns["y"][r] for r in rows]


def test_windows_line_ends_byte_order_mark_and_final_blank_lines(tmp_path):
    log = tmp_path / "log.csv"
    log.write_bytes("\ufeffu,i,t\r\n1,2,3\r\n1,3,4\r\n\r\n\n".encode())
    for chunk_rows in (1, 100):
        data = import_log([log], parse_mapping(**PLAIN), tmp_path / "out", quiet=True, chunk_rows=chunk_rows)
        assert data.time.tolist() == [0, 1]


def test_promise_holds_for_each_user_by_itself(tmp_path):
    columns = {"u": [1, 2, 1, 2], "i": [1, 1, 1, 1], "t": [5, 1, 6, 1]}
    assert imported(tmp_path, columns, chunk_rows=1, promise_sorted=True).time.tolist() == [4, 5, 0, 0]


def test_progress_reports_rows_on_standard_error(tmp_path, capsys):
    log = write(tmp_path / "log.parquet", LOG)
    import_log([log], parse_mapping(**PLAIN), tmp_path / "out")
    captured = capsys.readouterr()
    assert "6 rows" in captured.err
    assert captured.out == ""


def test_describe_counts_by_hand(tmp_path):
    data = imported(tmp_path, LOG, labels=["like=like", "love=stars==5"], event_features=["os=os"])
    summary = describe(data.path)
    assert (summary["users"], summary["items"], summary["events"]) == (3, 4, 6)
    assert summary["tasks"] == {"like": 0.5, "love": pytest.approx(1 / 3)}
    assert summary["first"] == "1970-01-01T00:01:40+00:00"
    assert summary["days"] == pytest.approx(20 / 86_400)
    assert summary["history"]["0.5"] == 2
    assert json.loads(json.dumps(summary)) == summary
    assert summary_table(summary).row_count == 8


def test_label_grammar():
    assert parse_label("like=rating>=4") == Label("like", "rating", ">=", 4.0)
    assert parse_label("love=3==5") == Label("love", "3", "==", 5.0)
    assert parse_label("y=my column") == Label("y", "my column")


@pytest.mark.parametrize("text", ["like", "=x", "like=", "like=a>4", "like=a>=", "like=a>=x", "1a=b", "a/b=c"])
def test_label_grammar_refuses(text):
    with pytest.raises(UserError, match="is not NAME=COL"):
        parse_label(text)


def test_mapping_is_hashable_and_has_a_plain_record():
    mapping = parse_mapping(**PLAIN, labels=["y=y"])
    assert mapping == LogMapping("u", "i", "t", (Label("y", "y"),))
    assert hash(mapping) == hash(parse_mapping(**PLAIN, labels=["y=y"]))
    assert json.loads(json.dumps(mapping.to_json()))["labels"][0]["column"] == "y"
