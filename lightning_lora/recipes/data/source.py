"""Sources of rows: local files or the Hugging Face Hub, read by `datasets` as train, validation and test splits.

A source is plain settings with one method, `load`. The data module says what the rows mean.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import datasets
import pyarrow
from datasets import Dataset, DatasetDict

from lightning_lora.checked import closest
from lightning_lora.errors import ConfigError, DataError, listed

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
"""Suffixes that may follow those of FORMATS: `datasets` reads compressed files too."""
LISTS = ("data", "rows", "examples")
"""Keys under which a JSON object may hold the rows."""
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class _Parts(NamedTuple):
    train: Dataset
    validation: Dataset
    test: Dataset | None
    predict: Dataset


class Splits(_Parts):
    """The rows of each split. `predict` is the test split, else the validation split that the source has, else all
    rows."""

    made: Mapping[str, str] = MappingProxyType({})
    """Split that was held back from the training rows -> the setting that held it back."""


@runtime_checkable
class Source(Protocol):
    """Anything that has rows, split the same way each time."""

    def load(self) -> Splits:
        """Read the rows. Raises DataError if they are missing, empty or malformed."""
        ...


@dataclass(frozen=True)
class DataSource:
    """Rows from local files (json, jsonl, csv, tsv, parquet, txt), a folder that `datasets` reads, or a Hub dataset.

    In CSV only an empty cell is a missing value: None, NA, null and nan are texts. Files that have changed are read
    again.

    Raises ConfigError for settings that are not valid; files are looked for in `load`.
    """

    path: str
    """A file, a pattern such as "data/*.jsonl", a folder (also of images by label, or of `save_to_disk`), or a Hub
    dataset's id."""
    validation_path: str | None = None
    """Local files of the validation split; for None see `validation_fraction`."""
    test_path: str | None = None
    """Local files of the test split."""
    name: str | None = None
    """The configuration of a Hub dataset, if it has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    format: Literal["json", "csv", "parquet", "text"] | None = None
    """The files' format; None takes it from their suffix."""
    text_unit: Literal["line", "paragraph", "document"] = "paragraph"
    """One row of a text file is a line, a paragraph (paragraphs are separated by empty lines), or the whole file."""
    train_split: str = "train"
    validation_split: str | None = None
    """Name of the validation split; None takes "validation", "valid", "val" or "dev" if there is one."""
    test_split: str | None = None
    """Name of the test split; None takes "test" if there is one."""
    validation_fraction: float = 0.1
    """Share of the training rows that is held back where there is no validation split."""
    test_fraction: float = 0.0
    """Share of the training rows that is held back for testing if there is no test split; 0 makes no test split."""
    limit: int | None = None
    """At most this many rows of each split, picked at random by `seed`; for predicting, the first ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1 or not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"validation_fraction {self.validation_fraction} must lie between 0 and 1, test_fraction "
                f"{self.test_fraction} too or be 0."
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError("validation_fraction and test_fraction together leave nothing to train on.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; give at least 1, or null for all rows.")
        if self.format is not None and self.format not in set(FORMATS.values()):
            raise ConfigError(f"format {self.format!r} is not one of {listed(sorted(set(FORMATS.values())))}.")

    def load(self) -> Splits:
        """Read and split the rows. Raises DataError if they are missing, empty or malformed."""
        if self._is_local_file():
            found = self._load_files()
        else:
            found = self._load_dataset()
        for name, rows in found.items():
            if len(rows) == 0:
                raise DataError(f"The split {name!r} of {self.path} has no rows.")
        return self._split(found)

    def _is_local_file(self) -> bool:
        path = Path(self.path).expanduser()
        if path.is_dir():
            return False
        looks_like_a_path = self.path.startswith(("/", "./", "../", "~")) or "*" in self.path
        return path.exists() or looks_like_a_path or _suffix(path) in FORMATS

    def _load_files(self) -> DatasetDict:
        paths = {"train": self.path, "validation": self.validation_path, "test": self.test_path}
        files = {split: _existing_files(path) for split, path in paths.items() if path is not None}
        every = [file for group in files.values() for file in group]
        kind = self.format or _format_of(every)
        options: dict[str, Any] = {}
        if kind == "csv":
            options = {"sep": "\t" if _suffix(every[0]) == ".tsv" else ",", "keep_default_na": False, "na_values": [""]}
        if kind == "text":
            options["sample_by"] = self.text_unit
        read = functools.partial(datasets.load_dataset, kind, cache_dir=_cache_for(every), **options)
        fields = self._splits_in(every) if kind == "json" else []
        try:
            if fields:
                found = DatasetDict({name: read(data_files=str(every[0]), field=name)["train"] for name in fields})
            else:
                paths_of = {split: [str(file) for file in group] for split, group in files.items()}
                found = read(data_files=paths_of, **({"field": _field_of(every)} if kind == "json" else {}))
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, ValueError, StopIteration) as error:
            raise DataError(_what_is_wrong(every, kind, error)) from error
        if any("__index_level_0__" in rows.column_names for rows in found.values()):
            raise DataError(
                f"{listed(map(str, every))}: the rows have more cells than the header has names. A text that has a "
                "comma in it needs quotes."
            )
        return found

    def _splits_in(self, files: list[Path]) -> list[str]:
        """The names of the splits, if a file is one JSON object that holds the rows by split: {"train": [...], "test":
        [...]}."""
        named = (self.train_split, self.validation_split, self.test_split, "train", *VALIDATION_NAMES, "test")
        for file in files:
            whole = _object_in(file)
            found = [name for name in dict.fromkeys(named) if name is not None and _is_rows(whole.get(name))]
            if found and len(files) > 1:
                raise DataError(
                    f"{file} holds its rows by split ({listed(found)}): give it alone, as path, without other files, "
                    "validation_path and test_path."
                )
            if found:
                return found
        return []

    def _load_dataset(self) -> DatasetDict:
        if self.validation_path is not None or self.test_path is not None or self.format is not None:
            raise DataError(
                f"validation_path, test_path and format go with a file, but {self.path!r} is a folder or a dataset of "
                "the Hub. Give validation_split or test_split."
            )
        path = str(Path(self.path).expanduser()) if self.path.startswith("~") else self.path
        folder = Path(path) if Path(path).is_dir() else None
        try:
            if folder is not None and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(path)
                return saved if isinstance(saved, DatasetDict) else DatasetDict({self.train_split: saved})
            cache = None if folder is None else _cache_for([file for file in folder.rglob("*") if file.is_file()])
            found = datasets.load_dataset(path, self.name, revision=self.revision, cache_dir=cache)
        # OSError: the dataset does not exist, or the Hub cannot be reached.
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise DataError(
                f"The dataset {self.path!r} cannot be loaded: {said} Check the spelling, `name` and `revision`, and "
                "that this machine reaches the Hub; a local file needs a path and one of the suffixes "
                f"{listed(FORMATS, most=9)}."
            ) from error
        assert isinstance(found, DatasetDict)
        return found

    def _in_units(self, count: int) -> str:
        """A hint for an error, if a text file gave a single row: it names another `text_unit` that would give
        several."""
        if count > 1 or not self._is_local_file() or self.text_unit == "line":
            return ""
        files = _existing_files(self.path)
        if (self.format or _format_of(files)) != "text" or any(file.suffix in COMPRESSED for file in files):
            return ""
        if self.text_unit == "document":
            return ", read with text_unit=document, where a file is one row (text_unit=paragraph or line makes more),"
        lines = sum(bool(line.strip()) for file in files for line in file.read_text(encoding="utf-8").splitlines())
        if lines > 1:
            return f" has no empty line, and so is one paragraph; its {lines} lines are rows with text_unit=line. It"
        return (
            " is one line, and so one row: put each row on a line of its own (text_unit=line), or empty lines between "
            "them. It"
        )

    def _split(self, found: DatasetDict) -> Splits:
        train = _named(found, self.train_split, self.path)
        validation_name = self.validation_split or next((name for name in VALIDATION_NAMES if name in found), None)
        test_name = self.test_split or ("test" if "test" in found else None)
        validation = None if validation_name is None else _named(found, validation_name, self.path)
        test = None if test_name is None else _named(found, test_name, self.path)
        predict = test or validation or train
        where = f"{self.path}{self._in_units(len(train))}"
        made = {}
        if test is None and self.test_fraction > 0:
            train, test = _hold_back(train, self.test_fraction, self.seed, where)
            made["test"] = f"test_fraction={self.test_fraction}"
        if validation is None:
            # The fraction counts all training rows. It is a larger share of the rows that the test split has left.
            share = self.validation_fraction / (1 - (self.test_fraction if test_name is None else 0))
            train, validation = _hold_back(train, share, self.seed, where)
            made["validation"] = f"validation_fraction={self.validation_fraction}"
        if self.limit is not None:
            train, validation = (_sample(rows, self.limit, self.seed) for rows in (train, validation))
            test = None if test is None else _sample(test, self.limit, self.seed)
            predict = predict.select(range(min(self.limit, len(predict))))
        splits = Splits(train, validation, test, predict)
        splits.made = made
        return splits


def require_columns(rows: Dataset, columns: Iterable[str], split: str, setting: str | None = None) -> None:
    """Raise DataError unless `rows` has all of `columns`. The error lists the columns that there are, and the `setting`
    that names one."""
    for column in columns:
        if column not in rows.column_names:
            meant = closest(column, rows.column_names, count=1)
            guess = f" Did you mean {meant[0]!r}?" if meant else ""
            raise DataError(
                f"The {split} data has no column {column!r}. Its columns are: {listed(rows.column_names)}.{guess}"
                + (f" Say which with {setting}." if setting is not None else "")
            )


def _existing_files(path: str) -> list[Path]:
    expanded = Path(path).expanduser()
    if "*" in path:
        files = [Path(name) for name in sorted(glob.glob(str(expanded), recursive=True))]
        if not files:
            raise DataError(f"No file matches {path} (from {Path.cwd()}).")
    elif expanded.is_dir():
        raise DataError(f"{expanded} is a folder. Name its files, such as {path.rstrip('/')}/*.jsonl.")
    elif not expanded.is_file():
        folder = expanded.absolute().parent
        beside = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        meant = closest(expanded.name, beside, count=1)
        raise DataError(
            f"There is no file {expanded.absolute()}."
            + (f" Did you mean {meant[0]}?" if meant else "" if folder.is_dir() else " Its folder is not there either.")
        )
    else:
        files = [expanded]
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty.")
    return files


def _suffix(file: Path) -> str:
    """The suffix of the file's format, without that of a compression: ".jsonl" of "a.jsonl.gz"."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return name.suffix.lower()


def _cache_for(files: list[Path]) -> str:
    """The cache folder of `datasets` for `files`, named by a hash of their content: `datasets` looks only at their
    times."""
    seen = hashlib.sha256()
    for file in sorted(files):
        seen.update(f"{file.absolute()} {file.stat().st_size}\n".encode())
        if _suffix(file) in FORMATS:  # others, such as images, are read again whenever they are used
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    seen.update(block)
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"lightning-lora-{seen.hexdigest()[:16]}")


def _object_in(file: Path) -> dict[str, Any]:
    """The content of `file` if it is one JSON object, else an empty dict."""
    if file.suffix.lower() == ".json":
        with contextlib.suppress(ValueError), file.open(encoding="utf-8-sig") as opened:
            # Files with one object per line, or with a fault, are handled where they are read.
            return json.load(opened) if opened.read(1) == "{" and not opened.seek(0) else {}
    return {}


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _field_of(files: list[Path]) -> str | None:
    """The key that holds the rows, if each file is one JSON object ({"data": [...]}); None if no file is."""
    found = set()
    for file in files:
        whole = _object_in(file)
        fields = [name for name in LISTS if isinstance(whole.get(name), list)]
        found.add(fields[0] if len(fields) == 1 and _is_rows(whole[fields[0]]) else None)
    if len(found) > 1:
        raise DataError(f"{listed(map(str, files))} hold their rows in different places: {listed(map(str, found))}.")
    return found.pop()


def _format_of(files: list[Path]) -> str:
    kinds = {FORMATS.get(_suffix(file)) for file in files}
    if len(kinds) == 1 and None not in kinds:
        return next(iter(kinds)) or ""
    suffixes = listed(sorted({file.suffix or "(none)" for file in files}))
    raise DataError(
        f"Files with the suffix {suffixes} cannot be read as one kind of data. Known are {listed(FORMATS, most=9)}; "
        "for another suffix give `format`."
    )


def _what_is_wrong(files: list[Path], kind: str, error: BaseException) -> str:
    """The message for files that cannot be read. For bad JSON, `datasets` says only 'an error occurred': find the file
    and line."""
    if kind == "json":
        for file in (file for file in files if file.suffix.lower() not in COMPRESSED):
            fault = _json_fault(file)
            if fault is not None:
                return f"{file}, {fault}"
    cause = " ".join(str(error.__cause__ or error).split())[:300]
    return f"{listed(map(str, files))} cannot be read as {kind}: {cause}"


def _json_fault(file: Path) -> str | None:
    try:
        if file.suffix.lower() == ".json":
            try:
                json.loads(file.read_text(encoding="utf-8"))
                return None
            except json.JSONDecodeError as error:
                whole = f"line {error.lineno}: not valid JSON ({error.msg})."
        else:
            whole = None
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    return whole or f"line {number}: not valid JSON ({error.msg}): {line.strip()[:80]}"
                if not isinstance(row, dict):
                    return f"line {number}: a JSON object was expected, but there is {line.strip()[:80]}"
    except UnicodeDecodeError as error:
        return f"byte {error.start}: not UTF-8."
    return None


def _named(found: DatasetDict, split: str, path: str) -> Dataset:
    if split not in found:
        raise DataError(f"{path} has no split {split!r}. Its splits are: {listed(found)}.")
    return found[split]


def _hold_back(rows: Dataset, fraction: float, seed: int, where: str) -> tuple[Dataset, Dataset]:
    held = max(1, round(fraction * len(rows)))
    if held >= len(rows):
        raise DataError(
            f"{where} has {len(rows)} row(s) to train on: too few to hold back {fraction:.0%}. "
            "Give more rows, or a validation split of its own."
        )
    order = rows.train_test_split(test_size=held, seed=seed)
    return order["train"], order["test"]


def _sample(rows: Dataset, limit: int, seed: int) -> Dataset:
    # Shuffled first: files are often sorted by label.
    return rows.shuffle(seed=seed).select(range(min(limit, len(rows))))
