"""Adapters and the import cache, on generated folders and, where they are present, on the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec_jax.data.catalog import default_cache, load_any, recognise
from genrec_jax.data.sequences import load
from genrec_jax.data.summary import describe
from genrec_jax.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"

RATINGS = [  # user, movie, rating, timestamp: user 2 comes first, one tie, one movie twice
    (2, 30, 5, 1000),
    (2, 10, 3, 900),
    (1, 10, 4, 2000),
    (1, 30, 1, 2000),
    (2, 10, 4, 950),
]


def movielens(folder: Path, layout: str) -> Path:
    folder.mkdir()
    movies = "10::Amélie (2001)::Comedy|Romance\n20::Never Rated (1990)::Drama\n30::Heat (1995)::Action|Crime|Drama\n"
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::25::16::70072\n3::M::25::15::55117\n")
    if layout == "original":
        (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in RATINGS))
        return folder
    pl.DataFrame(
        {
            "user_id": [r[0] for r in RATINGS],
            "movie_id": [r[1] for r in RATINGS],
            "timestamp": [r[3] for r in RATINGS],
            "like": [r[2] >= 4 for r in RATINGS],
            "rating": pl.Series([None if r[2] < 4 else r[2] for r in RATINGS], dtype=pl.Int8),
            "time_rank": [2, 0, 1, 0, 1],  # the tie of user 1 is ordered against file order
        }
    ).write_parquet(folder / "ratings.parquet")
    return folder


def test_movielens_20m(tmp_path):
    folder = tmp_path / "ml-20m"
    folder.mkdir()
    movies = 'movieId,title,genres\n7,"Comma, The (1999)",Drama|War\n5,Never Rated (1990),Drama\n'
    (folder / "movies.csv").write_text(movies)
    rows = [(1, 7, 3.5, 50), (2, 7, 5.0, 20), (2, 7, 4.0, 10)]
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in rows)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    data = load(load_any(folder, tmp_path / "cache", quiet=True))
    assert (data.name, data.users, data.events, data.schema.items) == ("ml-20m", 2, 3, 3)
    assert data.time.tolist() == [40, 0, 10]
    assert data.labels.tolist() == [[0, 0], [1, 0], [1, 1]]


def books_by_hand(rows):
    """Histories and catalogue by the public code's rule, with dictionaries."""
    users, items = ([row[i] for row in rows] for i in (0, 1))
    enough = [row for row in rows if users.count(row[0]) >= 5 and items.count(row[1]) >= 5]
    histories = {}
    for user, item, _, time in enough:
        histories.setdefault(user, []).append((time, item))
    histories = {user: sorted(events) for user, events in histories.items() if len(events) >= 5}
    return histories, {row[1] for row in enough}


def test_amazon_books_leaves_rare_users_and_items_out_once(tmp_path):
    """Counted once: items that fall below five with the users who leave stay in the catalogue."""
    rng = np.random.default_rng(0)
    rows = [(f"U{rng.geometric(0.1)}", f"{rng.geometric(0.08):010d}", 5.0, 1000 + 7 * i) for i in range(220)]
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "ratings_Books.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    data = load(load_any(folder, tmp_path / "cache", quiet=True))
    histories, catalogue = books_by_hand(rows)
    assert 0 < len(histories) < len({row[0] for row in rows})
    kept = {item for events in histories.values() for _, item in events}
    assert any(sum(i == item for e in histories.values() for _, i in e) < 5 for item in catalogue)
    assert kept <= catalogue < {row[1] for row in rows}
    keys = {name: pl.read_parquet(data.path / f"keys/{name}.parquet") for name in ("users", "items")}
    assert keys["items"]["id"].to_list() == list(range(1, len(catalogue) + 1))
    assert set(keys["items"]["key"]) == catalogue
    assert data.schema.items == len(catalogue) + 1
    item_of = dict(keys["items"].iter_rows())
    found = {
        user: [(int(data.time[e]) + data.origin, item_of[int(data.item[e])]) for e in range(*data.offsets[u : u + 2])]
        for u, user in keys["users"].iter_rows()
    }
    assert found == histories


def test_a_log_of_rare_items_alone_is_refused(tmp_path):
    (tmp_path / "ratings_Books.csv").write_text("U1,B1,5.0,7\nU2,B2,3.0,8\n")
    with pytest.raises(UserError, match=r"ratings_Books.csv: no user is left with 5 events"):
        load_any(tmp_path, tmp_path / "cache", quiet=True)
    assert not list((tmp_path / "cache").glob("*/dataset.json"))


@pytest.mark.parametrize("layout", ["original", "parquet"])
def test_movielens_1m(tmp_path, layout):
    data = load(load_any(movielens(tmp_path / "raw", layout), tmp_path / "cache", quiet=True))
    assert data.name == "ml-1m"
    assert (data.users, data.events, data.schema.items) == (2, 5, 4)  # the movie without a rating is in the catalogue
    tie = [1, 3] if layout == "original" else [3, 1]
    assert data.item.tolist() == [1, 1, 3, *tie]
    assert data.schema.tasks == ("like", "love")
    likes = {1: [1, 0], 3: [0, 0]}
    assert data.labels.tolist() == [[0, 0], [1, 0], [1, 1], likes[tie[0]], likes[tie[1]]]
    assert data.time.tolist() == [0, 50, 100, 1100, 1100]
    assert data.features["genres"].tolist() == [[0, 0, 0], [1, 2, 0], [3, 0, 0], [4, 5, 3]]
    assert data.features["gender"].tolist() == [2, 1]  # users 2 and 1; F is the table's first category
    assert data.features["age"].tolist() == [2, 1]
    assert data.features["occupation"].tolist() == [2, 1]
    assert [(f.name, f.level, f.width) for f in data.schema.features] == [
        ("gender", "user", 1),
        ("age", "user", 1),
        ("occupation", "user", 1),
        ("genres", "item", 3),
    ]


def test_movielens_100k(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t2\t5\t20\n7\t1\t3\t10\n"
    )
    (raw / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '1\t"A\t1995\tDrama Sci-Fi\n2\tB\t\t\n'
    )
    (raw / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n7\t24\tM\twriter\t8\n"
    )
    data = load(load_any(raw, tmp_path / "cache", quiet=True))
    assert data.name == "ml-100k"
    assert data.item.tolist() == [1, 2]
    assert data.labels.tolist() == [[0, 0], [1, 1]]
    assert data.features["genres"].tolist() == [[0, 0], [1, 2], [0, 0]]
    assert data.features["occupation"].tolist() == [1]


def test_amazon_orders_a_day_by_position(tmp_path):
    raw = amazon(tmp_path / "raw")
    data = load(load_any(raw, tmp_path / "cache", quiet=True))
    assert data.name == "amazon-beauty"
    assert data.schema.tasks == ()
    keys = pl.read_parquet(data.path / "keys/items.parquet")["key"].to_list()
    assert [keys[i - 1] for i in data.item] == [12, 11, 13, 11]


def amazon(folder: Path) -> Path:
    folder.mkdir()
    pl.DataFrame(
        {"user": [0, 0, 0, 1], "pos": [1, 0, 2, 0], "item": [11, 12, 13, 11], "timestamp": [0, 0, 86_400, 0]}
    ).write_parquet(folder / "reviews.parquet")
    return folder


def test_globo_reads_milliseconds_and_context(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    context = ("environment", "deviceGroup", "os", "country", "region", "referrer_type")
    pl.DataFrame(
        {"user_id": [0, 0, 1], "click_article_id": [157, 68, 157], "click_timestamp": [5_500, 4_999, 4_000]}
        | {f"click_{name}": [4, 1, 4] for name in context}
    ).write_parquet(raw / "clicks.parquet")
    data = load(load_any(raw, tmp_path / "cache", quiet=True))
    assert data.item.tolist() == [2, 1, 1]
    assert data.time.tolist() == [0, 1, 0]
    assert tuple(f.name for f in data.schema.features) == context
    assert all(data.features[name].tolist() == [2, 1, 1] for name in context)


def test_a_dataset_folder_is_returned_as_it_is(tmp_path):
    dataset = load_any(amazon(tmp_path / "raw"), tmp_path / "cache", quiet=True)
    assert load_any(dataset, tmp_path / "unused") == dataset
    assert not (tmp_path / "unused").exists()


def test_the_cache_is_used_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "cache"))
    raw = amazon(tmp_path / "raw")
    first = load_any(raw, quiet=True)
    assert first.parent == default_cache() == tmp_path / "cache/datasets"
    stamp = (first / "dataset.json").stat().st_mtime_ns
    assert load_any(raw, quiet=True) == first
    assert (first / "dataset.json").stat().st_mtime_ns == stamp
    os.utime(raw / "reviews.parquet", (1, 1))
    assert load_any(raw, quiet=True) != first


def test_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("GENREC_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/genrec/datasets"


def test_parallel_callers_import_once(tmp_path):
    raw, cache = movielens(tmp_path / "raw", "original"), tmp_path / "cache"
    program = (
        "import sys; from genrec_jax.data.catalog import load_any; path = load_any(*sys.argv[1:], quiet=True); "
        "print(path, (path / 'dataset.json').stat().st_ino)"
    )
    command = [sys.executable, "-c", program, str(raw), str(cache)]
    callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {caller.communicate(timeout=60)[0] for caller in callers}
    assert len(answers) == 1  # one path, and one file: nobody replaced another's folder
    assert "ml-1m-" in answers.pop()
    assert {p.suffix for p in cache.iterdir() if not p.is_dir()} == {".lock"}


@pytest.mark.parametrize(("name", "message"), [("empty", "import your own log with `genrec data"), ("no", "not exist")])
def test_unknown_folders_are_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        load_any(tmp_path / name, tmp_path / "cache")


def test_a_file_for_a_cache_is_refused(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="set GENREC_CACHE"):
        load_any(amazon(tmp_path / "raw"), tmp_path / "cache", quiet=True)


COUNTS = {
    "ml-1m": (6_040, 3_883, 1_000_209),
    "ml-100k": (943, 1_682, 100_000),
    "amazon-beauty": (22_363, 12_101, 198_502),
    "globo": (322_897, 46_033, 2_988_181),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_data(tmp_path, name):
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} beside the project")
    data = load(load_any(REAL / name, tmp_path, quiet=True))
    assert (data.users, data.schema.items - 1, data.events) == COUNTS[name]
    inside = np.ones(data.events - 1, bool)
    inside[data.offsets[1:-1] - 1] = False  # the steps from one user to the next
    assert (np.diff(data.time)[inside] >= 0).all()
    assert data.item.min() == 1
    assert data.item.max() < data.schema.items
    for feature in data.schema.features:
        assert data.features[feature.name].max() == feature.vocab - 1
    assert json.dumps(describe(data.path))


def test_real_movielens_keeps_the_order_of_the_source(tmp_path):
    if not (REAL / "ml-1m").is_dir():
        pytest.skip("no ml-1m beside the project")
    data = load(load_any(REAL / "ml-1m", tmp_path, quiet=True))
    source = pl.read_parquet(REAL / "ml-1m/ratings.parquet").sort("user_id", "time_rank")
    items = pl.read_parquet(data.path / "keys/items.parquet")["key"].to_numpy()
    np.testing.assert_array_equal(items[data.item - 1], source["movie_id"].to_numpy())
    np.testing.assert_array_equal(data.labels[:, 0], source["like"].to_numpy())
    np.testing.assert_array_equal(data.labels[:, 1], (source["rating"] == 5).fill_null(False).to_numpy())
    np.testing.assert_array_equal(data.time + data.origin, source["timestamp"].to_numpy())


def test_adapters_do_not_take_each_others_folders(tmp_path):
    assert recognise(movielens(tmp_path / "a", "parquet")).name == "ml-1m"  # type: ignore[union-attr]
    assert recognise(amazon(tmp_path / "b")).name == "amazon-beauty"  # type: ignore[union-attr]
    assert recognise(tmp_path) is None
