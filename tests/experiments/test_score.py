"""``genrec score`` from a user's log to scores: what it says is what evaluation says of the same impressions."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from experiments.cli import main
from genrec_jax.batch import Shape
from genrec_jax.config import Trial, default_trial, override
from genrec_jax.data.importer import import_log
from genrec_jax.data.log import SideTable, parse_feature, parse_mapping
from genrec_jax.data.packing import Assembler
from genrec_jax.data.rows import request_rows
from genrec_jax.data.sequences import Sequences, digest_of
from genrec_jax.data.splits import split_by_time
from genrec_jax.train.checkpoint import Checkpoints
from genrec_jax.train.estimate import init_params
from genrec_jax.train.evaluate import make_scorer
from genrec_jax.train.loop import restored
from genrec_jax.train.optimizer import make_optimizer
from genrec_jax.train.record import write_json
from genrec_jax.train.step import init_state

SETTINGS = {
    "data.history": 6,
    "data.candidates": 3,
    "data.validation": 0.2,
    "data.test": 0.2,
    "model.width": 8,
    "model.depth": 1,
}
START = 978_300_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """A log with original ids, requests of up to two events, and features of every level, as a dataset folder."""
    root = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    rows = [
        (f"u{u}", 100 + 7 * int(draw.integers(20)), START + 1000 * (e // 2) + u, int(draw.integers(2)), f"r{e // 2}")
        for u in range(12)
        for e in range(12)
    ]
    log = pl.DataFrame(rows, schema=["who", "what", "when", "clicked", "shown"], orient="row")
    log = log.with_columns(
        country=pl.col("who").map_elements(lambda u: "at" if u < "u4" else "de", return_dtype=pl.String),
        device=pl.Series([("tv", "pc", None)[i // 2 % 3] for i in range(len(log))]),
    )
    log.write_csv(root / "log.csv")
    genres = pl.DataFrame({"what": range(100, 240, 7), "genres": ["a|b", "b", None, "c|a|b"] * 5})
    genres.write_csv(root / "items.csv")
    mapping = parse_mapping(
        user="who",
        item="what",
        time="when",
        labels=["click=clicked"],
        request="shown",
        user_features=["country=country"],
        event_features=["device=device"],
        tables=[SideTable("item", root / "items.csv", "what", (parse_feature("genres=genres[|]"),))],
    )
    return import_log([root / "log.csv"], mapping, root / "data", quiet=True)


@pytest.fixture(scope="module")
def runs(data: Sequences, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trials that were stopped before their first step: their scores are as good as any."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("hstu", "dirl"):
        trial = trial_of(data, name)
        (root / name).mkdir()
        write_json(root / name / "config.json", trial.to_json())
        params = init_params(trial, data.schema)
        with contextlib.closing(Checkpoints(root / name / "checkpoints")) as checkpoints:
            checkpoints.save(0, init_state(params, make_optimizer(trial.train, 1), trial.seed), {})
    return root


def trial_of(data: Sequences, name: str) -> Trial:
    return override(default_trial(name, path=str(data.path), digest=digest_of(data.path)), SETTINGS)


def keys(data: Sequences, name: str) -> dict[int, Any]:
    table = pq.read_table(data.path / f"keys/{name}.parquet").to_pydict()
    return dict(zip(table["id"], table["key"]))


def impressions(data: Sequences) -> Iterator[tuple[dict[str, Any], Any]]:
    """(a request of the test part in original ids, the same as a Batch), one by one."""
    rows = request_rows(data, split_by_time(data, 0.2, 0.2), "test", 6, 3)
    items, users = keys(data, "items"), keys(data, "users")
    countries, devices = keys(data, "features/country"), keys(data, "features/device")
    assemble = Assembler(data, rows, Shape(6, 3))
    for r in range(len(rows)):
        history = range(rows.history_start[r], rows.history_stop[r])
        first, user = rows.history_stop[r], int(rows.user[r])
        record = {
            "user": users[user],
            "time": data.origin + int(data.time[first]),
            "context": {
                "country": countries[int(data.features["country"][user])],
                "device": devices.get(int(data.features["device"][first])),
            },
            "history": [
                {
                    "item": items[int(data.item[e])],
                    "time": data.origin + int(data.time[e]),
                    "labels": {"click": int(data.labels[e, 0])},
                    "request": int(data.request[e]) if data.request is not None else None,
                }
                for e in history
            ],
            "candidates": [items[int(data.item[e])] for e in range(rows.target_start[r], rows.target_stop[r])],
        }
        yield record, assemble(np.array([[r]]))


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(records).write_parquet(path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def score(run: Path, requests: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    main(["score", str(run), "--requests", str(requests), "--out", str(out), "--microbatch", "4", "--quiet", *more])
    return read(out)


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["score", *map(str, args)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", ["hstu", "dirl"])
def test_scores_are_those_of_evaluation(name: str, data: Sequences, runs: Path, tmp_path: Path) -> None:
    """From JSON lines and from parquet, in original ids, against the trained model on the pipeline's own rows."""
    _, model, params = restored(trial_of(data, name), runs / name)
    evaluate = make_scorer(model)
    records, batches = zip(*impressions(data))
    want = [
        expit(np.asarray(evaluate(params, batch))[0, : len(r["candidates"]), 0]) for r, batch in zip(records, batches)
    ]
    assert any(len(r["history"]) == 6 for r in records)
    assert np.ptp(np.concatenate(want)) > 0.01
    lines = score(runs / name, write(tmp_path / "in.jsonl", list(records)), tmp_path / "out.jsonl")
    assert [line["row"] for line in lines] == list(range(1, len(records) + 1))
    assert [line["user"] for line in lines] == [r["user"] for r in records]
    for line, probabilities in zip(lines, want):
        np.testing.assert_allclose(line["scores"]["click"], probabilities, rtol=0, atol=1e-6)
    table = score(runs / name, write(tmp_path / "in.parquet", list(records)), tmp_path / "out.parquet")
    for row, line in zip(table, lines, strict=True):
        assert np.float32(line["scores"]["click"]).tolist() == row["scores"]["click"]
        assert (row["row"], row["user"]) == (line["row"], line["user"])


def test_restarted_and_appended_requests(data: Sequences, runs: Path, tmp_path: Path) -> None:
    """The same file twice gives the same bytes; increments give what whole histories give."""
    whole = next(r for r, _ in impressions(data) if len(r["history"]) == 6)
    start = {**whole, "history": whole["history"][:3], "time": whole["history"][2]["time"]}
    more = [{**whole, "append": [event], "time": event["time"]} for event in whole["history"][3:]]
    stream = [start, *({k: v for k, v in r.items() if k != "history"} for r in more), {**whole, "user": None}]
    stream[-2]["time"] = whole["time"]
    requests = write(tmp_path / "in.jsonl", stream)
    first = score(runs / "hstu", requests, tmp_path / "a.jsonl")
    score(runs / "hstu", requests, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    np.testing.assert_allclose(first[-2]["scores"]["click"], first[-1]["scores"]["click"], rtol=0, atol=1e-6)
    assert len(first) == 5


def test_bad_rows_stop_or_are_skipped_and_counted(
    data: Sequences, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [record for record, _ in impressions(data)][:3]
    bad = [{**good[0], "candidates": ["nope"]}, {**good[0], "user": "stranger", "append": []}]
    del bad[1]["history"]
    requests = write(tmp_path / "in.jsonl", [good[0], bad[0], good[1], bad[1], good[2]])
    out = tmp_path / "out.jsonl"
    out.write_text("as it was")
    said = fails(capsys, runs / "hstu", "--requests", requests, "--out", out)
    assert f"{requests}, line 2: item 'nope'" in said
    assert out.read_text() == "as it was"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}
    lines = score(runs / "hstu", requests, out, "--skip-bad")
    assert [line["row"] for line in lines] == [1, 3, 5]
    said = capsys.readouterr().err
    assert f"skipped: {requests}, line 4: user 'stranger' has no history here" in said
    assert "skipped 2 bad rows" in said
    alone = score(runs / "hstu", write(tmp_path / "good.jsonl", good), tmp_path / "good-out.jsonl")
    assert [line["scores"] for line in lines] == [line["scores"] for line in alone]


def test_an_exported_trial_scores_alike(data: Sequences, runs: Path, tmp_path: Path, capsys: Any) -> None:
    requests = write(tmp_path / "in.jsonl", [record for record, _ in impressions(data)][:4])
    main(["export", str(runs / "dirl"), "--out", str(tmp_path / "scorer"), "--microbatch", "4"])
    main(
        ["score", str(tmp_path / "scorer"), "--requests", str(requests), "--out", str(tmp_path / "a.jsonl"), "--quiet"]
    )
    for one, other in zip(
        score(runs / "dirl", requests, tmp_path / "b.jsonl"), read(tmp_path / "a.jsonl"), strict=True
    ):
        np.testing.assert_allclose(one["scores"]["click"], other["scores"]["click"], rtol=0, atol=1e-6)
    capsys.readouterr()
    said = fails(capsys, tmp_path / "scorer", "--requests", requests, "--cache-type", "int8")
    assert "--cache-type was decided when" in said
    assert "no exported scorer" in fails(capsys, requests, "--requests", requests)


def test_without_out_scores_go_to_stdout(
    data: Sequences, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, _ = next(impressions(data))
    main(["score", str(runs / "hstu"), "--requests", str(write(tmp_path / "in.jsonl", [record]))])
    said = capsys.readouterr()
    assert json.loads(said.out)["row"] == 1
    assert said.err == ""


def test_bad_arguments_are_one_sentence(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write(tmp_path / "in.jsonl", [])
    for more, words in (
        ([tmp_path, "--requests", requests], "holds no trial"),
        ([runs / "hstu", "--requests", tmp_path / "none.jsonl"], "none.jsonl does not exist"),
        ([runs / "hstu", "--requests", requests, "--out", tmp_path / "out.csv"], "must end in"),
        ([runs / "hstu", "--requests", requests, "--microbatch", 0], "microbatch"),
        ([runs / "hstu", "--requests", requests, "--cache-type", "int4"], "int4"),
    ):
        assert words in fails(capsys, *more)
