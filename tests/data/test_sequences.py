"""Dataset folders: identity by content, replacement in one step, refusal of damaged ones."""

import json
import os
import shutil

import numpy as np
import pytest

from genrec_jax.data import sequences as folders
from genrec_jax.data.importer import import_log
from genrec_jax.data.log import parse_mapping
from genrec_jax.data.sequences import digest_of, load, verify, writing
from genrec_jax.data.summary import describe
from genrec_jax.data.synthetic import generate, preset
from genrec_jax.errors import UserError
from tests.data.helpers import dataset

TIMES = [[0, 1, 2], [], [3, 4]]


def test_digest_knows_the_content_and_not_the_place(tmp_path):
    one = dataset(tmp_path / "a", TIMES)
    assert len(one.digest) == 12
    assert one.digest == digest_of(tmp_path / "a")
    assert dataset(tmp_path / "b", TIMES, name="other").digest == one.digest
    others = [dataset(tmp_path / "c", [[0, 1, 2], [], [3, 5]]), dataset(tmp_path / "d", TIMES, [[0, 0, 1], [], [0, 0]])]
    assert len({one.digest, *(other.digest for other in others)}) == 3


def test_digest_of_an_import_knows_labels_and_their_names_but_not_keys(tmp_path):
    def digest(key, label, value):
        log = tmp_path / "log.csv"
        log.write_text(f"u,i,t,y\n{key},b,5,{value}\n{key},a,7,1\n", encoding="utf-8")
        mapping = parse_mapping(user="u", item="i", time="t", labels=[f"{label}=y"])
        return import_log([log], mapping, tmp_path / "out", quiet=True).digest

    first = digest("ann", "click", 0)
    assert digest("bob", "click", 0) == first
    assert digest("ann", "like", 0) != first
    assert digest("ann", "click", 1) != first


def test_digest_of_a_world_is_of_its_finished_columns(tmp_path):
    world = preset("tiny", users=1100, requests=2)
    one = generate(world, tmp_path / "one", floor_requests=0)
    two = generate(world, tmp_path / "two", workers=2, floor_requests=16)
    other = generate(preset("tiny", users=1100, requests=2, seed=1), tmp_path / "other", floor_requests=0)
    assert (one.name, two.name) == ("one", "two")
    assert one.digest == two.digest != other.digest


def test_replacement_never_leaves_the_disk_without_a_dataset(tmp_path, monkeypatch):
    out = tmp_path / "data"
    old = dataset(out, TIMES).digest
    real, seen = os.rename, []

    def rename(source, target):
        found = [folder for folder in tmp_path.iterdir() if (folder / "dataset.json").is_file()]
        seen.append({digest_of(folder) for folder in found})
        real(source, target)

    monkeypatch.setattr(folders.os, "rename", rename)
    new = dataset(out, [[0, 1]]).digest
    assert seen == [{old, new}] * 2
    assert digest_of(out) == new
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_failed_replacement_leaves_the_old_dataset(tmp_path, monkeypatch):
    out = tmp_path / "data"
    old = dataset(out, TIMES).digest
    with pytest.raises(KeyError), writing(out):
        raise KeyError
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        real(source, target)

    monkeypatch.setattr(folders.os, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        dataset(out, [[0, 1]])
    assert digest_of(out) == old
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_replacement_through_a_link_keeps_the_link(tmp_path):
    dataset(tmp_path / "real", TIMES)
    (tmp_path / "link").symlink_to("real")
    new = dataset(tmp_path / "link", [[0, 1]])
    assert (tmp_path / "link").is_symlink()
    assert digest_of(tmp_path / "real") == new.digest
    assert len(list(tmp_path.iterdir())) == 2


def refused(path):
    with pytest.raises(UserError) as refusal:
        load(path)
    said = str(refusal.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("key", ["format", "name", "digest", "schema", "origin", "has_requests"])
def test_manifest_without_a_key_is_refused(tmp_path, key):
    dataset(tmp_path / "d", TIMES)
    file = tmp_path / "d/dataset.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    del record[key]
    file.write_text(json.dumps(record), encoding="utf-8")
    assert key in refused(tmp_path / "d")
    with pytest.raises(UserError, match=key):
        digest_of(tmp_path / "d")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "\xff"])
def test_manifest_that_is_none_is_refused(tmp_path, text):
    dataset(tmp_path / "d", TIMES)
    (tmp_path / "d/dataset.json").write_text(text, encoding="latin-1")
    assert "dataset.json" in refused(tmp_path / "d")


@pytest.mark.parametrize(("part", "value"), [("items", None), ("tasks", None), ("features", [{"name": "x"}])])
def test_incomplete_schema_is_refused(tmp_path, part, value):
    dataset(tmp_path / "d", TIMES)
    file = tmp_path / "d/dataset.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["schema"][part] = value
    file.write_text(json.dumps(record), encoding="utf-8")
    assert "schema" in refused(tmp_path / "d")


DAMAGES = [
    ("offsets", [0, 3, 2, 5], "offsets"),
    ("offsets", [1, 3, 3, 5], "offsets"),
    ("offsets", [0, 3, 3, 4], "length"),
    ("events/time", [0, 1, 2, 3], "length"),
    ("events/labels", np.zeros((4, 2)), "length"),
    ("events/labels", np.zeros((5, 3)), "labels"),
    ("events/request", [0, 0, 0, 1], "length"),
    ("events/item", [1, 2, 3, 4, 6], "item ids"),
    ("events/item", [0, 2, 3, 4, 5], "item ids"),
    ("users/country", [1, 2], "country"),
    ("items/genres", np.ones((3, 2)), "genres"),
    ("events/device", [1], "device"),
]


@pytest.mark.parametrize(("column", "values", "named"), DAMAGES)
def test_damaged_columns_are_refused(tmp_path, column, values, named):
    dataset(tmp_path / "d", TIMES, [[0, 0, 1], [], [0, 1]])
    file = tmp_path / f"d/{column}.npy"
    np.save(file, np.asarray(values).astype(np.load(file).dtype))
    assert named in refused(tmp_path / "d")


def test_a_changed_value_is_found_when_all_is_read(tmp_path):
    data = dataset(tmp_path / "d", TIMES)
    verify(data.path)
    file = tmp_path / "d/events/time.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    load(data.path)  # nothing that must fit together tells
    with pytest.raises(UserError, match=f"d is damaged: .* but {data.digest} when it was made"):
        verify(data.path)


def test_a_short_column_is_refused(tmp_path):
    dataset(tmp_path / "d", TIMES)
    file = tmp_path / "d/events/time.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert "events/time.npy" in refused(tmp_path / "d")


def test_missing_column_is_refused(tmp_path):
    dataset(tmp_path / "d", TIMES)
    shutil.rmtree(tmp_path / "d/events")
    assert "item.npy" in refused(tmp_path / "d")


def test_requests_are_counted_user_by_user(tmp_path):
    """Two users may use the same id, the first right after the other."""
    dataset(tmp_path / "d", [[0, 1, 2], [], [3, 4], [5]], [[0, 0, 1], [], [1, 2], [2]])
    assert describe(tmp_path / "d")["requests"] == 5
    dataset(tmp_path / "e", TIMES)
    assert describe(tmp_path / "e")["requests"] is None
