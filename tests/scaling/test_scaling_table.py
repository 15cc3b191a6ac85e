"""Reading results tables: what is accepted, and that each refusal names the file and the row or column."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scaling.table import TableError, read_table

GOOD = "trial,family,train_flops,ne,status\nt1,hstu,1e12,0.8,done\nt2,hstu,1e13,,diverged\n"


def write(tmp_path: Path, text: str, name: str = "r.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    return path


def test_reads_numbers_and_missing_cells(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, GOOD))
    np.testing.assert_array_equal(table.numbers("ne"), [0.8, np.nan])
    np.testing.assert_array_equal(table.numbers("train_flops"), [1e12, 1e13])
    assert table.text("status") == ["done", "diverged"]
    assert table.metrics() == ["ne"]


def test_csv_round_trip_keeps_every_cell(tmp_path: Path) -> None:
    tricky = 'trial,label,ne\nt1,"a, ""b""\nc",0.12345678901234567\nt2,é,\n'
    table = read_table(write(tmp_path, tricky))
    again = read_table(write(tmp_path, table.to_csv(), "again.csv"))
    assert again.rows == table.rows
    assert again.columns == table.columns


def test_jsonl_equals_csv_and_a_folder_means_its_results(tmp_path: Path) -> None:
    lines = '{"trial": "t1", "family": "hstu", "train_flops": 1e12, "ne": 0.8}\n\n{"trial": "t2", "ne": null}\n'
    table = read_table(write(tmp_path, lines, "r.jsonl"))
    np.testing.assert_array_equal(table.numbers("ne"), [0.8, np.nan])
    write(tmp_path, GOOD, "results.csv")
    assert len(read_table(tmp_path)) == 2


def test_several_tables_join_and_missing_columns_are_empty(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD, "a.csv")
    second = write(tmp_path, "trial,auc\nt9,0.7\n", "b.csv")
    table = read_table([first, second])
    assert len(table) == 3
    np.testing.assert_array_equal(table.numbers("auc"), [np.nan, np.nan, 0.7])
    assert "b.csv, line 2" in table.origins[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("1e13", "fast"), ["line 3", "'fast'", "'train_flops'"]),
        (GOOD.replace("0.8,done", "0.8"), ["line 2", "4 cells", "5"]),
        (GOOD.replace("status\n", "ne\n"), ["'ne'", "twice"]),
        (GOOD.replace("family", " "), ["column 2", "no name"]),
        ("trial,ne\n", ["no rows"]),
        ("", ["empty"]),
        ('trial,ne\n"t1,0.5\n', ["not valid CSV"]),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TableError) as caught:
        read_table(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_bad_bytes_bad_json_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such results table"):
        read_table(tmp_path / "absent.csv")
    binary = tmp_path / "b.csv"
    binary.write_bytes(b"trial,ne\n\xff\xfe,1\n")
    with pytest.raises(TableError, match="not UTF-8"):
        read_table(binary)
    with pytest.raises(TableError, match="line 1: not valid JSON"):
        read_table(write(tmp_path, "{oops\n", "x.jsonl"))
    with pytest.raises(TableError, match=r"good\.csv: the column 'auc' is missing"):
        read_table(write(tmp_path, GOOD, "good.csv")).require("auc")


def test_parquet_is_read_as_csv_is(tmp_path: Path) -> None:
    columns = {"family": ["a", None], "ne": [0.5, float("nan")], "train_flops": [1e12, 2e12], "seed": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("family,ne,train_flops,seed\na,0.5,1e12,0\n,,2e12,1\n", encoding="utf-8")
    parquet, text = read_table([tmp_path / "t.parquet"]), read_table([tmp_path / "t.csv"])
    for name in ("ne", "train_flops", "seed"):
        np.testing.assert_array_equal(parquet.numbers(name), text.numbers(name))
    assert parquet.text("family") == text.text("family")
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(TableError, match=r"bad\.parquet: not a parquet table"):
        read_table([tmp_path / "bad.parquet"])
