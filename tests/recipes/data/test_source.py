"""A data source splits rows the same way each time, and says what is wrong with files that it cannot read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import datasets
import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data import DataSource, Source
from lightning_lora.recipes.data.source import require_columns


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbers(count: int) -> list[dict]:
    return [{"text": f"row {index}", "number": index} for index in range(count)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = datasets.Dataset.from_list(numbers(10))
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        rows.to_parquet(path)
    elif suffix in ("csv", "tsv"):
        rows.to_csv(path, sep="," if suffix == "csv" else "\t")
    else:
        rows.to_json(path, lines=suffix == "jsonl")
    splits = DataSource(str(path), validation_fraction=0.2).load()
    assert sorted(splits.train["number"][:] + splits.validation["number"][:]) == list(range(10))
    assert splits.predict["text"][:] == [row["text"] for row in numbers(10)]
    assert splits.test is None


@pytest.mark.parametrize(("unit", "rows"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_a_text_file_is_read_by_line_paragraph_or_document(tmp_path, unit, rows):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n")
    other = tmp_path / "b.txt"
    other.write_text("held back\n")
    splits = DataSource(str(path), validation_path=str(other), text_unit=unit).load()
    assert len(splits.train) == rows


def test_the_split_depends_on_the_seed_alone(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(50))
    first, again, other = (DataSource(path, seed=seed).load() for seed in (1, 1, 2))
    assert first.validation["number"][:] == again.validation["number"][:]
    assert first.validation["number"][:] != other.validation["number"][:]
    assert len(first.validation) == 5


def test_fractions_are_of_all_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(100))
    splits = DataSource(path, validation_fraction=0.3, test_fraction=0.2).load()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (50, 30, 20)
    used = splits.train["number"][:] + splits.validation["number"][:] + splits.test["number"][:]
    assert sorted(used) == list(range(100))


def test_splits_of_their_own_are_left_as_they_are(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", numbers(count)) for name, count in zip("abc", (5, 3, 2))]
    splits = DataSource(*paths).load()
    assert [len(part) for part in splits] == [5, 3, 2, 2]
    assert splits.train["number"][:] == [0, 1, 2, 3, 4]


def test_a_folder_with_files_named_by_split_is_read(tmp_path):
    for name, count in (("train", 4), ("validation", 2), ("test", 1)):
        write_jsonl(tmp_path / f"{name}.jsonl", numbers(count))
    assert [len(part) for part in DataSource(str(tmp_path)).load()] == [4, 2, 1, 1]


def test_a_pattern_reads_several_files(tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", numbers(5))
    splits = DataSource(str(tmp_path / "*.jsonl")).load()
    assert len(splits.predict) == 10


def test_a_limit_takes_rows_from_everywhere_but_the_first_for_predicting(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(100))
    splits = DataSource(path, limit=5).load()
    assert [len(splits.train), len(splits.validation)] == [5, 5]
    assert max(splits.train["number"]) > 10
    assert splits.predict["number"][:] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": oops}\n', r"a\.jsonl, line 2: not valid JSON.*oops"),
        ("a.json", '[{"a": 1},\n{"a": }]', r"a\.json, line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: a JSON object was expected"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "a,b\n1,2\n3,4,5,6\n", "cannot be read as csv.*line 3"),
        ("a.parquet", "no parquet at all", "cannot be read as parquet"),
        ("a.csv", "a,b\n", "cannot be read as csv|has no rows"),
        ("a.docx", "?", r"suffix \.docx.*give `format`"),
        ("a.txt", "one\n", "too few to hold back"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_says_where(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        DataSource(str(path)).load()


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl"):
        DataSource(str(path)).load()


def test_a_missing_file_is_named_with_the_closest_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", numbers(3))
    with pytest.raises(DataError, match=r"There is no file .*trian\.jsonl\. Did you mean train\.jsonl"):
        DataSource(str(tmp_path / "trian.jsonl")).load()
    with pytest.raises(DataError, match=r"Its folder is not there"):
        DataSource(str(tmp_path / "nowhere" / "train.jsonl")).load()
    with pytest.raises(DataError, match=r"No file matches"):
        DataSource(str(tmp_path / "*.csv")).load()


def test_a_dataset_out_of_reach_says_what_to_check(tmp_path):
    with pytest.raises(DataError, match=r"'nobody/nothing' cannot be loaded.*Check the spelling"):
        DataSource("nobody/nothing").load()
    with pytest.raises(DataError, match=r"cannot be loaded"):
        DataSource(str(tmp_path)).load()  # an empty folder


def test_paths_of_further_files_do_not_go_with_a_dataset(tmp_path):
    with pytest.raises(DataError, match="go with a file"):
        DataSource(str(tmp_path), validation_path="a.jsonl").load()


def test_a_split_that_is_not_there_lists_those_that_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbers(5))
    with pytest.raises(DataError, match=r"has no split 'training'. Its splits are: train"):
        DataSource(path, train_split="training").load()


def test_a_column_that_is_not_there_lists_those_that_are():
    with pytest.raises(DataError, match=r"no column 'txt'. Its columns are: text, number. Did you mean 'text'"):
        require_columns(datasets.Dataset.from_list(numbers(2)), ["txt"], "train")


@pytest.mark.parametrize(
    "settings",
    [{"validation_fraction": 0}, {"test_fraction": 1.0}, {"test_fraction": 0.95}, {"limit": 0}, {"format": "xml"}],
)
def test_settings_that_cannot_be_fail_on_construction(settings):
    with pytest.raises(ConfigError):
        DataSource("a.jsonl", **settings)


def test_a_data_source_is_a_source():
    assert isinstance(DataSource("a.jsonl"), Source)


@pytest.mark.parametrize(
    ("text", "unit", "said"),
    [
        ("one\ntwo\nthree\n", "paragraph", "its 3 lines are rows with text_unit=line"),
        ("one\n\ntwo\n", "document", "text_unit=paragraph or line makes more"),
        ("one " * 100, "paragraph", "is one line"),
    ],
)
def test_a_text_that_is_one_row_says_which_unit_makes_several(tmp_path, text, unit, said):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match="too few to hold back") as raised:
        DataSource(str(tmp_path / "a.txt"), text_unit=unit).load()
    assert said in str(raised.value)


WORDS = ["None", "NA", "null", "nan", "N/A", "n/a", "NULL", "NaN", "<NA>", "#N/A", "fine", "1e5x"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
def test_words_of_a_table_stay_words_and_empty_cells_are_missing(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    separator = "\t" if suffix == "tsv" else ","
    lines = [f"text{separator}label", *(f"{word}{separator}{word}" for word in WORDS), f"{separator}x"]
    table = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(table) if suffix.endswith("gz") else table)
    rows = DataSource(str(path)).load().predict
    assert rows["text"][:] == [*WORDS, None]
    assert rows["label"][:] == [*WORDS, "x"]


def test_rows_with_more_cells_than_the_header_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nhello, world,a\nbye, all,b\n")
    with pytest.raises(DataError, match=r"a\.csv: the rows have more cells than the header has names"):
        DataSource(str(path)).load()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_a_file_that_was_replaced_is_read_anew_whatever_its_time(tmp_path, kind):
    path = tmp_path / ("train.csv" if kind == "csv" else "train.jsonl")
    for word in ("one", "two"):
        path.write_text(f"text,n\n{word},1\n{word},2\n" if kind == "csv" else f'{{"text": "{word}"}}\n' * 2)
        os.utime(path, (1_600_000_000, 1_600_000_000))
        source = DataSource(str(tmp_path if kind == "folder" else path), validation_fraction=0.5)
        assert source.load().predict["text"][:] == [word] * 2


@pytest.mark.parametrize("pack", [gzip, bz2, lzma])
def test_compressed_files_are_read(tmp_path, pack):
    path = tmp_path / f"a.jsonl.{ {gzip: 'gz', bz2: 'bz2', lzma: 'xz'}[pack] }"
    path.write_bytes(pack.compress("".join(json.dumps(row) + "\n" for row in numbers(5)).encode()))
    assert DataSource(str(path)).load().predict["number"][:] == list(range(5))


@pytest.mark.parametrize("key", ["data", "rows", "examples"])
def test_rows_below_a_key_are_read(tmp_path, key):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", key: numbers(5)}, indent=1))
    assert DataSource(str(path)).load().predict["number"][:] == list(range(5))
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps(numbers(3)))
    with pytest.raises(DataError, match=rf"hold their rows in different places: .*{key}"):
        DataSource(str(tmp_path / "*.json")).load()


def test_folders_of_save_to_disk_are_read(tmp_path):
    rows = datasets.Dataset.from_list(numbers(5))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "dev": rows.select([4])}).save_to_disk(tmp_path / "two")
    assert DataSource(str(tmp_path / "one")).load().predict["number"][:] == list(range(5))
    both = DataSource(str(tmp_path / "two")).load()
    assert (both.train["number"][:], both.validation["number"][:]) == (list(range(5)), [4])


def test_rows_by_split_in_one_json_object_are_those_splits(tmp_path):
    parts = {"train": [{"text": f"a{n}"} for n in range(9)], "test": [{"text": "t"}], "validation": [{"text": "v"}]}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, **parts}))
    splits = DataSource(str(path)).load()
    assert [list(rows["text"]) for rows in splits[:3]] == [
        [row["text"] for row in parts[name]] for name in ("train", "validation", "test")
    ]
    path.write_text(json.dumps({"train": parts["train"]}))
    splits = DataSource(str(path), validation_fraction=0.3).load()
    assert sorted([*splits.train["text"], *splits.validation["text"]]) == [f"a{n}" for n in range(9)]
    path.write_text(json.dumps({"test": parts["test"]}))
    with pytest.raises(DataError, match=r"has no split 'train'\. Its splits are: test"):
        DataSource(str(path)).load()
    other = tmp_path / "more.json"
    other.write_text(json.dumps({"validation": parts["validation"]}))
    (tmp_path / "rows.json").write_text(json.dumps(parts["train"]))
    with pytest.raises(DataError, match=r"more.json holds its rows by split \(validation\): give it alone"):
        DataSource(str(path), validation_path=str(other)).load()
