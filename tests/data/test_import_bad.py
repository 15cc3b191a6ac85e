"""Bad logs: one sentence that names file and row or column, and nothing half-written."""

import os
import re
from pathlib import Path

import polars as pl
import pytest

from genrec_jax.data.importer import import_log
from genrec_jax.data.log import FeatureColumn, SideTable, parse_mapping, read_mapping
from genrec_jax.data.sequences import load
from genrec_jax.errors import UserError

GOOD = "u,i,t,y\n1,1,5,0\n1,2,6,1\n2,1,7,0\n"
LABELS = {"labels": ["y=y"]}


def run(folder: Path, files: dict, options: dict | None = None, chunk_rows: int = 1 << 18) -> None:
    """Writes ``files`` (text, bytes or a dictionary of parquet columns) and imports those named ``log*``."""
    for name, content in files.items():
        if isinstance(content, dict):
            pl.DataFrame(content).write_parquet(folder / name)
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    logs = [folder / name for name in files if name.startswith("log")]
    columns = {"user": "u", "item": "i", "time": "t"} | (options or {})
    import_log(logs, parse_mapping(**columns), folder / "out", quiet=True, chunk_rows=chunk_rows)


def columns(**replaced) -> dict:
    return {"log.parquet": {"u": [1, 1, 2], "i": [1, 2, 1], "t": [5, 6, 7], "y": [0, 1, 0]} | replaced}


def lines(second: str) -> dict:
    """A CSV whose second data row, line 3, is replaced."""
    return {"log.csv": f"u,i,t,y\n1,1,5,0\n{second}\n2,1,7,0\n"}


ODD_UTF8 = b"u,i,t,y\n1,1,5,0\n1,caf\xe9,6,1\n"
CASES = {
    "extension": ({"log.xlsx": "x"}, {}, r"log.xlsx has extension '.xlsx'; logs are read from .parquet, .csv"),
    "missing column": ({"log.csv": GOOD}, {"item": "movie"}, r"no column 'movie' \(for item\).*are u, i, t, y"),
    "missing parquet column": (columns(), {"item": "movie"}, r"no column 'movie' \(for item\).*are u, i, t, y"),
    "missing label column": ({"log.csv": GOOD}, {"labels": ["like=z"]}, r"no column 'z' \(for label like\)"),
    "missing dat column": ({"log.dat": "1::2::3\n"}, {"user": "1", "item": "2", "time": "4"}, r"'4'.*are 1, 2, 3"),
    "text in time": (lines("1,2,noon,1"), {}, r"log.csv, line 3: column 't' \(for time\) is 'noon'.*not a number"),
    "text time type": (columns(t=["a", "b", "c"]), {}, r"log.parquet: column 't' \(for time\) has type text"),
    "text in label": (lines("1,2,6,yes"), LABELS, r"line 3: column 'y' \(for label y\) is 'yes'"),
    "text label type": (columns(y=["a", "b", "c"]), LABELS, r"column 'y' \(for label y\) has type text, not boolean"),
    "float user": (columns(u=[1.0, 1.0, 2.0]), {}, r"column 'u' \(for user\) has type float"),
    "date time": (columns(t=pl.Series([1, 2, 3]).cast(pl.Date)), {}, r"column 't' \(for time\) has type date32"),
    "float feature": (columns(y=[0.5, 1.0, 2.0]), {"event_features": ["f=y"]}, r"\(for feature f\) has type float"),
    "null user": (columns(u=[1, None, 2]), {}, r"log.parquet, row 2: column 'u' \(for user\) has no value"),
    "null item": (lines("1,,6,1"), {}, r"log.csv, line 3: column 'i' \(for item\) has no value"),
    "empty text item": (columns(i=["a", "", "b"]), {}, r"row 2: column 'i' \(for item\) has no value"),
    "null time": (columns(t=[1, 2, None]), {}, r"row 3: column 't' \(for time\) has no value"),
    "null label": (columns(y=[1, 0, None]), LABELS, r"row 3: column 'y' \(for label y\) has no value"),
    "null request": (columns(y=[1, 0, None]), {"request": "y"}, r"row 3: column 'y' \(for request\) has no value"),
    "label range": (columns(y=[0, 1, 2]), LABELS, r"row 3: column 'y' \(for label y\) is 2, which is neither 0 nor 1"),
    "label fraction": (lines("1,2,6,0.5"), LABELS, r"line 3: column 'y' \(for label y\) is 0.5, which is neither"),
    "label NaN": (columns(y=[0.0, float("nan"), 1.0]), LABELS, r"row 2: .* is nan, which is neither 0 nor 1"),
    "empty file": ({"log.csv": ""}, {}, r"log.csv is empty"),
    "empty parquet file": ({"log.parquet": b""}, {}, r"log.parquet is empty"),
    "header only": ({"log.csv": "u,i,t,y\n"}, {}, r"log.csv has no rows"),
    "no parquet rows": (columns(u=[], i=[], t=[], y=[]), {}, r"log.parquet has no rows"),
    "second file empty": ({"log1.csv": GOOD, "log2.csv": "u,i,t\n"}, {}, r"log2.csv has no rows"),
    "blank header": ({"log.csv": "\n1,2,3\n"}, {}, r"log.csv, line 1 is blank"),
    "duplicate header": ({"log.csv": "u,i,t,u\n1,2,3,4\n"}, {}, r"log.csv has two columns named 'u'"),
    "ragged row": (lines("1,2"), {}, r"log.csv, line 3 has 2 fields instead of 4"),
    "long row": (lines("1,2,3,4,5"), {}, r"log.csv, line 3 has 5 fields instead of 4"),
    "truncated last row": ({"log.csv": "u,i,t,y\n1,1,5,0\n1,2"}, {}, r"log.csv, line 3 has 2 fields instead of 4"),
    "ragged dat": ({"log.dat": "1::2::3\n1::2\n"}, {"user": "1", "item": "2", "time": "3"}, r"line 2 has 2 fields"),
    "open quote": (lines('1,"2,6,1'), {}, r"log.csv, line 3 has an unclosed quote or a line break"),
    "line break in value": (lines('1,"a\nb",6,1'), {}, r"log.csv, line 3 has an unclosed quote or a line break"),
    "carriage return in value": (lines("1,a\rb,6,1"), {}, r"log.csv, line 3 has an unclosed quote or a line break"),
    "blank line": (lines(""), {}, r"log.csv, line 3"),
    "not parquet": ({"log.parquet": "u,i,t\n"}, {}, r"log.parquet is not a readable parquet file"),
    "not UTF-8": ({"log.csv": ODD_UTF8}, {}, r"log.csv, line 3 is not UTF-8 text"),
    "header not UTF-8": ({"log.csv": b"u,i,t,caf\xe9\n1,1,5,0\n"}, {}, r"log.csv, line 1 is not UTF-8 text"),
    "promise": (
        columns(u=[1, 2, 1], t=[5, 6, 4]),
        {"promise_sorted": True},
        r"log.parquet, row 3: time is before that of the same user's previous event",
    ),
    "promise across files": (
        {"log1.csv": "u,i,t\n1,1,5\n", "log2.csv": "u,i,t\n2,1,5\n1,1,4\n"},
        {"promise_sorted": True},
        r"log2.csv, line 3: time is before",
    ),
    "negative time": (lines("1,2,-6,1"), {}, r"log.csv, line 3: column 't' \(for time\) is -6, which is negative"),
    "NaN time": (columns(t=[1.0, float("nan"), 2.0]), {}, r"row 2: .* is nan, which is not a whole number"),
    "infinite time": (columns(t=[1.0, float("inf"), 2.0]), {}, r"row 2: .* is inf, which does not fit 64 bits"),
    "fraction of time": (lines("1,2,6.5,1"), {}, r"log.csv, line 3: .* is 6.5, which is not a whole number"),
    "huge time": (lines("1,2,99999999999999999999,1"), {}, r"line 3: .* which does not fit 64 bits"),
    "span": (columns(t=[0, 2**31, 1]), {}, r"row 2: time is 2147483648 s after the first event.*check the unit"),
    "kinds differ": (
        {"log1.parquet": columns()["log.parquet"], "log2.parquet": columns(u=["a", "b", "c"])["log.parquet"]},
        {},
        r"log2.parquet: column 'u' is text, but integer in .*log1.parquet",
    ),
    "columns differ": ({"log1.csv": GOOD, "log2.csv": "u,i,when\n1,2,3\n"}, {}, r"log2.csv has no column 't'"),
    "interrupted request": (
        columns(u=[1, 1, 1], y=[8, 9, 8]),
        {"request": "y"},
        r"log.parquet, row 3: the request was interrupted by another one of the same user",
    ),
    "user feature varies": (columns(), {"user_features": ["f=y"]}, r"row 2: user feature 'f' differs"),
    "time unit": (columns(), {"time_unit": "auto"}, r"time unit 'auto' is not one of s, ms, us, ns"),
    "label twice": (columns(), {"labels": ["y=y", "y=t"]}, r"label 'y' is given more than once"),
    "feature twice": (columns(), {"user_features": ["f=y"], "item_features": ["f=y"]}, r"feature 'f' is given more"),
    "reserved feature": (columns(), {"event_features": ["time=y"]}, r"cannot be named 'time'"),
    "separator in log": (columns(), {"event_features": ["f=y[|]"]}, r"feature 'f' has a separator"),
    "unclear feature": (columns(), {"event_features": ["y"]}, r"feature 'y' is not NAME=COL"),
    "no files": ({}, {}, r"no log file was given"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_log_is_refused_in_one_sentence(tmp_path, case):
    files, options, message = CASES[case]
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, files, options)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == sorted(files)  # neither the dataset nor a scratch folder


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_are_named_across_chunks(tmp_path, suffix):
    times = [10] * 200
    times[150] = -1
    table = {"u": [1] * 200, "i": [1] * 200, "t": times}
    content = table if suffix == "parquet" else "u,i,t\n" + "".join(f"1,1,{t}\n" for t in times)
    with pytest.raises(UserError, match="row 151:" if suffix == "parquet" else "line 152:"):
        run(tmp_path, {f"log.{suffix}": content}, chunk_rows=3)


def test_ragged_blank_and_undecodable_lines_are_named_across_chunks(tmp_path):
    good = "1,1,5\n" * 100
    for bad, message in [(b"1,1\n", "line 102 has 2 fields"), (b"\n", "line 102"), (b"1,\xe9,1\n", "line 102 is not")]:
        with pytest.raises(UserError, match=message):
            run(tmp_path, {"log.csv": b"u,i,t\n" + good.encode() + bad + good.encode()}, chunk_rows=1)


def test_missing_file_and_folder(tmp_path):
    for path, message in [(tmp_path / "no.csv", "no.csv does not exist"), (tmp_path, "is a folder")]:
        with pytest.raises(UserError, match=message):
            import_log([path], parse_mapping(user="u", item="i", time="t"), tmp_path / "out", quiet=True)


def test_truncated_parquet(tmp_path):
    run(tmp_path, columns())
    log = tmp_path / "log.parquet"
    content = log.read_bytes()
    with pytest.raises(UserError, match=r"log\.parquet is not a readable parquet file"):
        run(tmp_path, {"log.parquet": content[:-20]})


def test_damaged_parquet_page(tmp_path):
    run(tmp_path, columns())
    content = bytearray((tmp_path / "log.parquet").read_bytes())
    content[4:40] = b"\xff" * 36  # the first pages; the footer stays whole
    with pytest.raises(UserError, match=r"log\.parquet cannot be read after row 0"):
        run(tmp_path, {"log.parquet": bytes(content)})


def table(folder: Path, name: str, content: str, level="item") -> dict:
    (folder / name).write_text(content)
    return {"tables": [SideTable(level, folder / name, "id", (FeatureColumn("f", "f"),))]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("side.csv", "id,f\n1,a\n2,b\n1,c\n", r"side.csv, line 4: key '1' is already in the table"),
        ("side.csv", "id,f\n2,a\n", r"log.parquet, row 1: item 1 is not in the item table"),
        ("side.csv", "id,f\n,a\n", r"side.csv, line 2: column 'id' \(for key\) has no value"),
        ("side.csv", "id,g\n1,a\n", r"side.csv has no column 'f' \(for feature f\)"),
        ("side.csv", "id,f\n", r"side.csv has no rows"),
        ("side.xml", "id,f\n", r"side.xml has extension"),
    ],
)
def test_bad_side_tables(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, columns(), table(tmp_path, name, content))
    assert not (tmp_path / "out").exists()


def test_duplicate_key_in_a_user_table(tmp_path):
    with pytest.raises(UserError, match="line 3: key 'x' is already"):
        run(tmp_path, columns(), table(tmp_path, "side.csv", "id,f\nx,a\nx,a\n", level="user"))


def test_a_failed_import_leaves_the_existing_dataset(tmp_path):
    run(tmp_path, columns())
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(UserError):
        run(tmp_path, columns(t=[3, 2, -1]))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    run(tmp_path, columns(t=[8, 9, 10]))
    assert load(tmp_path / "out").origin == 8


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a dataset folder"):
        run(tmp_path, columns())
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('user = "u"\n', "key 'item' is missing"),
        ('user = "u"\nitem = "i"\ntime = "t"\nlabel = ["a=b"]\n', "unknown key 'label'"),
        ('user = "u"\nitem = "i"\ntime = 3\n', "key 'time' must be a text"),
        ('user = "u"\nitem = "i"\ntime = "t"\nlabels = "a=b"\n', "key 'labels' must be a list of texts"),
        ('user = "u"\nitem = "i"\ntime = "t"\npromise_sorted = 1\n', "must be true or false"),
        ('user = "u"\nitem = "i"\ntime = "t"\nlabels = ["a"]\n', "label 'a' is not NAME=COL"),
        ('user = "u"\nitem = "i"\ntime = "t"\n[[table]]\nlevel = "item"\n', "key 'file' is missing"),
        ('user = "u"\nitem = "i"\ntime = "t"\n[table]\nlevel = "item"\n', r"write side tables as \[\[table\]\]"),
        (
            'user="u"\nitem="i"\ntime="t"\n[[table]]\nlevel="event"\nfile="f"\nkey="k"\nfeatures=[]\n',
            "level 'event' is neither",
        ),
        ("user = \n", "not a readable TOML file"),
    ],
)
def test_bad_mapping_files_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "mapping.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message) as caught:
        read_mapping(path)
    assert "\n" not in str(caught.value)


def test_missing_mapping_file(tmp_path):
    with pytest.raises(UserError, match=r"m\.toml does not exist"):
        read_mapping(tmp_path / "m.toml")
