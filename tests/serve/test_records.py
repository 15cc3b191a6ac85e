"""Requests in original ids: what they mean, and one clear sentence for each that means nothing."""

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from genrec_jax.data.schema import Feature, Schema
from genrec_jax.errors import UserError
from genrec_jax.serve.catalogue import Catalogue
from genrec_jax.serve.records import decode, read_rows

SCHEMA = Schema(
    items=4,
    tasks=("click", "like"),
    features=(
        Feature("genre", vocab=6, width=2, level="item"),
        Feature("country", vocab=4, width=1, level="user"),
        Feature("tags", vocab=4, width=3, level="event"),
    ),
)
ORIGIN = 1_000_000
GENRES = np.array([[0, 0], [1, 2], [3, 0], [5, 4]])
IMPORTED = Catalogue(
    SCHEMA,
    ORIGIN,
    {"genre": GENRES},
    items={"m7": 1, "12": 2, "x": 3},
    categories={"country": {"at": 1, "true": 2}, "tags": {"a": 1, "b": 2, "c": 3}},
)
DENSE = Catalogue(SCHEMA, ORIGIN, {"genre": GENRES}, items=None, categories={})


def event(item, time, click=0, like=0, **more):
    return {"item": item, "time": ORIGIN + time, "labels": {"click": click, "like": like}, **more}


def record():
    return {
        "user": 17,
        "time": ORIGIN + 90,
        "context": {"country": "at", "tags": ["c", "a"]},
        "history": [event("m7", 5, 1), event(12, 30, like=1, request="r"), event("x", 30, request="r")],
        "candidates": ["x", "12"],
    }


def test_a_request_in_original_ids():
    request = decode(record(), IMPORTED)
    assert (request.user, request.time, request.append) == ("17", 90, False)
    assert request.item.tolist() == [3, 2]
    assert request.features["genre"].tolist() == [[5, 4], [3, 0]]
    assert request.context["country"] == 1
    assert request.context["tags"].tolist() == [3, 1, 0]
    events = request.events
    assert events.item.tolist() == [1, 2, 3]
    assert events.time.tolist() == [5, 30, 30]
    assert events.labels.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert events.before.tolist() == [0, 1, 1]
    assert events.features["genre"].tolist() == [[1, 2], [3, 0], [5, 4]]


def test_what_may_be_left_out_or_null():
    sparse = {"time": ORIGIN, "history": [], "candidates": [], "append": None, "user": None, "context": {"tags": None}}
    request = decode(sparse, IMPORTED)
    assert request.user is None
    assert (len(request.item), len(request.events)) == (0, 0)
    assert request.context["country"] == 0
    assert request.context["tags"].tolist() == [0, 0, 0]
    assert request.features["genre"].shape == (0, 2)


def test_an_increment_and_a_dataset_without_keys():
    changed = record() | {"append": [event(3, 8)], "candidates": [1], "context": {"country": 3, "tags": [2]}}
    del changed["history"]
    request = decode(changed, DENSE)
    assert request.append
    assert request.events.item.tolist() == [3]
    assert request.context["country"] == 3
    assert request.context["tags"].tolist() == [2, 0, 0]
    with pytest.raises(UserError, match="item 4 is not in"):
        decode(changed | {"candidates": [4]}, DENSE)
    with pytest.raises(UserError, match="no category 'at'"):
        decode(changed | {"context": {"country": "at"}}, DENSE)


def with_event(**changes):
    return lambda r: r["history"][1].update(changes)


BAD = {
    "not an object": lambda r: [r],
    "unknown key 'histroy'": lambda r: r.update(histroy=[]),
    "either 'history' or 'append'": lambda r: r.update(append=[]),
    "either 'history' or": lambda r: r.pop("history"),
    "no 'time'": lambda r: r.pop("time"),
    "no 'candidates'": lambda r: r.pop("candidates"),
    "'candidates' is not a list": lambda r: r.update(candidates="x"),
    "'history' is not a list": lambda r: r.update(history={}),
    "item 'nope' is not in the catalogue": lambda r: r["candidates"].append("nope"),
    "item 3.0 is neither": lambda r: r["candidates"].append(3.0),
    "item None is neither": lambda r: r["candidates"].append(None),
    "user 1.5 is neither": lambda r: r.update(user=1.5),
    "user True is neither": lambda r: r.update(user=True),
    "no valid text": lambda r: r.update(user="\ud800"),
    "time is nan, not a whole": lambda r: r.update(time=math.nan),
    "time is '90', not a whole": lambda r: r.update(time="90"),
    "time is 90, outside 1000000": lambda r: r.update(time=90),
    "outside 1000000 .* Unix seconds": lambda r: r.update(time=10**13),
    "event 2: item 'm8' is not": with_event(item="m8"),
    "event 2: its time is True": with_event(time=True),
    "event 2 is earlier than the one before": with_event(time=ORIGIN + 4),
    "event 2 has no 'labels'": with_event(labels=None),
    "event 2 has an unknown key 'lables'": with_event(lables={}),
    "event 2 has no label 'like'": with_event(labels={"click": 1}),
    "labels has an unknown key 'share'": with_event(labels={"click": 1, "like": 0, "share": 1}),
    "labels is not an object": with_event(labels=[1, 0]),
    "label 'like' is 2, neither": with_event(labels={"click": 1, "like": 2}),
    "label 'click' is nan, neither": with_event(labels={"click": math.nan, "like": 0}),
    "request 0.5 is neither": with_event(request=0.5),
    "event 2 is not an object": lambda r: r["history"].__setitem__(1, "m7"),
    "context has an unknown key 'age'": lambda r: r["context"].update(age=3),
    "context is not an object": lambda r: r.update(context=[1]),
    "no category 'de'": lambda r: r["context"].update(country="de"),
    "holds one category, not a list": lambda r: r["context"].update(country=["at"]),
    "at most 3 categories": lambda r: r["context"].update(tags=["a"] * 4),
    "'country' is 1.0, neither": lambda r: r["context"].update(country=1.0),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_record_is_one_sentence(words):
    changed = copy.deepcopy(record())
    changed = BAD[words](changed) if words == "not an object" else (BAD[words](changed), changed)[1]
    with pytest.raises(UserError, match=words) as error:
        decode(changed, IMPORTED)
    assert "\n" not in str(error.value)


def test_a_long_value_is_cut_short():
    with pytest.raises(UserError) as error:
        decode(record() | {"candidates": ["x" * 10_000]}, IMPORTED)
    assert len(str(error.value)) < 200


def test_lines_are_numbered_and_faults_named(tmp_path: Path):
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": NaN}\n{"a"\n\xff\xfe\n' + b"[" * 100_000 + b"\n7")
    rows = list(read_rows(file))
    assert [row.number for row in rows] == [1, 3, 4, 5, 6, 7]
    assert rows[0].record == {"a": 1}
    assert [row.fault for row in rows] == [
        "",
        "it holds NaN, which is no number",
        *["it is not valid JSON"] * 3,
        "",
    ]
    assert rows[-1].done == 1
    assert all(a.done <= b.done for a, b in itertools.pairwise(rows))


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "bad.parquet").write_text(json.dumps(record()))
    (tmp_path / "r.txt").write_text("")
    for name, words in (
        ("none.jsonl", "does not exist"),
        ("bad.parquet", "not a readable parquet"),
        ("r.txt", "must end in .jsonl or .parquet"),
    ):
        with pytest.raises(UserError, match=words):
            list(read_rows(tmp_path / name))
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_rows(tmp_path / "d.jsonl")
