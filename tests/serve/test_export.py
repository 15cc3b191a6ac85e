"""A scorer written to a file and read back scores alike, on every platform it can be lowered for."""

import dataclasses
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export

from genrec_jax.errors import UserError
from genrec_jax.serve import Scorer
from genrec_jax.serve.catalogue import Catalogue
from genrec_jax.serve.programs import Programs
from genrec_jax.serve.scorer import Shapes
from tests.models.gr_helpers import SCHEMA, random_batch
from tests.serve.helpers import HISTORY, model_of, requests_of
from tests.serve.test_scorer import SHAPE, TOLERANCE, part


def test_read_back_it_scores_alike(tmp_path: Path):
    """Encoding in several chunks, an increment, single and shared calls; the catalogue comes along."""
    model, params, _ = model_of("hstu")
    shapes = Shapes(HISTORY, 4, 2, model.layout.per_event, model.layout.context, smallest=HISTORY, chunks=(16,))
    table = {f.name: np.ones((40, f.width) if f.width > 1 else 40, np.int32) for f in SCHEMA.item_features}
    catalogue = Catalogue(SCHEMA, 5, table, items={"a": 1}, categories={"age": {"x": 2}})
    live = Scorer(Programs(model, "int8"), params, SCHEMA, shapes, catalogue=catalogue)
    live.export(tmp_path / "scorer")
    loaded = Scorer.load(tmp_path / "scorer")
    assert loaded.shapes == shapes
    assert loaded.schema == SCHEMA
    assert loaded.catalogue.item("a") == 1
    assert loaded.catalogue.origin == 5
    np.testing.assert_array_equal(loaded.catalogue.features["genre"], table["genre"])
    requests = requests_of(random_batch(SHAPE, [[40], [17], [0]]))
    stream = [*requests, dataclasses.replace(part(requests[1], 0, 3), events=requests[0].events[39:])]
    stream[-1] = dataclasses.replace(stream[-1], time=10**8, events=_later(stream[-1].events))
    for got, want in zip(loaded.logits(stream), live.logits(stream), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    with zipfile.ZipFile(tmp_path / "scorer") as archive:
        names = [each for each in archive.namelist() if each.startswith("programs/")]
        assert len(names) == 3
        for each in names:
            assert jax_export.deserialize(bytearray(archive.read(each))).platforms == ("cpu", "cuda", "tpu")
    with pytest.raises(UserError, match="cannot be exported again"):
        loaded.export(tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["scorer"]


def _later(events):
    return dataclasses.replace(events, time=np.full(len(events), 10**8 - 1, np.int32))


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "text").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "other", "w") as archive:
        archive.writestr("something", "else")
    with zipfile.ZipFile(tmp_path / "later", "w") as archive:
        archive.writestr("scorer.json", '{"format": 99}')
    for name, words in (("none", "none"), ("text", "text"), ("other", "scorer.json"), ("later", "format 99")):
        with pytest.raises(UserError, match=words):
            Scorer.load(tmp_path / name)


def test_leaves_are_numbered_as_the_tree_orders_them():
    """What a file's parameters rely on: a list of a tree's leaves flattens to the same leaves."""
    _, params, _ = model_of("hstu")
    leaves = jax.tree.leaves(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(leaves), leaves, strict=True))
