"""Data that every installation has: the standard library's source, its docstrings, a few chats, and shapes drawn here.

The standard library is only read, not imported or run. Which split a text falls into depends on its own hash and the
seed, not on its neighbours.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data.source import DataSource, Splits

Row = TypeVar("Row")

LEFT_OUT = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",  # tables of characters
    "idle_test",
    "msilib",  # tables
    "pydoc_data",  # documentation topics, on which the embedded base was trained
    "site-packages",
    "test",
    "tests",
}
PACKAGES = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "mailbox": "mailbox.py",
    "multiprocessing": "multiprocessing",
    "tarfile": "tarfile.py",
    "unittest": "unittest",
    "urllib": "urllib",
    "xml": "xml",
}
"""Label -> its path in the standard library: packages and modules with many docstrings that every CPython from 3.10 on
has."""
SHAPES = ("circle", "cross", "square", "triangle")
PIRATE_CHATS = Path(__file__).parents[2] / "embedded" / "pirate_chats.jsonl"


def pirate_chats(validation_fraction: float = 0.1, seed: int = 0) -> DataSource:
    """Sixty questions with short answers in pirate speech: enough to change how a language model talks.

    Columns: `prompt`, `response`.
    """
    return DataSource(str(PIRATE_CHATS), validation_fraction=validation_fraction, seed=seed)


@dataclass(frozen=True)
class StdlibSource:
    """The source files of the standard library as texts, split by file; without tests and tables.

    Columns: `path`, `text`. Other Python versions have other files, so compare figures on one version only.
    """

    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_characters: int | None = 2_000_000
    """Take files until all splits together have this many characters; None takes all (about 10 million)."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fractions(self.validation_fraction, self.test_fraction)

    def load(self) -> Splits:
        """Read the files. Raises DataError if this Python was installed without its source."""
        root = _standard_library()
        names = _shuffled([str(path.relative_to(root).as_posix()) for path in _source_files(root)], str, self.seed)
        rows, left = [], self.max_characters
        for name in names:
            text = _read(root / name)
            if not text.strip():
                continue
            if left is not None:
                if left <= 0:
                    break
                text = text[:left]
                left -= len(text)
            rows.append({"path": name, "text": text})
        if len(rows) < 3:
            raise DataError(
                f"There are {len(rows)} source files in {root}, too few for three splits: this Python came without its "
                f"source, or max_characters={self.max_characters} is too little."
            )
        features = Features({"path": Value("string"), "text": Value("string")})
        return _cut(rows, len, self, features)


@dataclass(frozen=True)
class StdlibDocstrings:
    """Docstrings of the standard library's modules, classes and functions, labelled by the package they come from.

    Columns: `text`, `label`. About 2,000 rows in all. Repeated docstrings are kept once; a docstring that occurs in two
    packages is left out.
    """

    validation_fraction: float = 0.2
    test_fraction: float = 0.2
    min_characters: int = 30
    """Shorter docstrings ("Return a copy.") say nothing about their package."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fractions(self.validation_fraction, self.test_fraction)

    def load(self) -> Splits:
        """Read the docstrings. Raises DataError if this Python was installed without its source."""
        root = _standard_library()
        found: dict[str, tuple[str, str] | None] = {}
        for label, place in PACKAGES.items():
            for path in _source_files(root / place):
                for text in _docstrings(_read(path)):
                    key = " ".join(text.lower().split())
                    if len(key) < self.min_characters:
                        continue
                    known = found.setdefault(key, (text, label))
                    if known is not None and known[1] != label:
                        found[key] = None
        rows = [{"text": row[0], "label": row[1]} for row in found.values() if row is not None]
        labels = sorted(PACKAGES)
        if {row["label"] for row in rows} != set(labels):
            raise DataError(f"{root} lacks docstrings of some of {labels}: this Python came without all its source.")
        rows = _shuffled(rows, lambda row: row["text"], self.seed)
        return _cut(rows, None, self, Features({"text": Value("string"), "label": ClassLabel(names=labels)}))


@dataclass(frozen=True)
class Shapes:
    """Images of circles, crosses, squares and triangles, `size` by `size` pixels, in any colour and place, on noise.

    Columns: `image`, `label`. `seed` determines the images. There are `count` of them in all splits together, equally
    many of each shape.
    """

    count: int = 1000
    size: int = 32
    validation_fraction: float = 0.2
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fractions(self.validation_fraction, self.test_fraction)
        if self.count < 20 or self.size < 16:
            raise ConfigError(f"count {self.count} must be at least 20, size {self.size} at least 16 pixels.")

    def load(self) -> Splits:
        """Draw the images."""
        random = np.random.default_rng(self.seed)
        rows = [
            {"image": _draw(SHAPES[index % len(SHAPES)], self.size, random), "label": index % len(SHAPES)}
            for index in range(self.count)
        ]
        return _cut(rows, None, self, Features({"image": Image(), "label": ClassLabel(names=list(SHAPES))}))


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _source_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return sorted(
        path
        for path in place.rglob("*.py")
        if not LEFT_OUT.intersection(path.relative_to(place).parts)
        # Written when Python is built, so they differ from machine to machine.
        and not path.name.startswith("_sysconfigdata")
        and not path.parent.name.startswith("config-")
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and files for another version of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _shuffled(rows: list[Row], key: Callable[[Row], str], seed: int) -> list[Row]:
    """Sort by hash: the same texts have the same order on every machine and Python, whatever other texts there are."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{key(row)}".encode()).digest())


def _cut(
    rows: list[dict],
    size: Callable[[str], int] | None,
    source: StdlibSource | StdlibDocstrings | Shapes,
    features: Features,
) -> Splits:
    """The first rows are for validation, the next for testing, the rest for training. Shares are measured by `size` of
    the text, or in rows if it is None."""
    sizes = [1 if size is None else size(row["text"]) for row in rows]
    ends = np.cumsum(sizes) / sum(sizes)
    # Take as many rows as it takes to reach the share; 1e-9 is for sums that miss it by rounding.
    validation, test = 1 + np.searchsorted(
        ends, np.array([source.validation_fraction, source.validation_fraction + source.test_fraction]) - 1e-9
    )
    test = max(validation + 1, test)
    parts = {"validation": rows[:validation], "test": rows[validation:test], "train": rows[test:]}
    found = {name: Dataset.from_list(part, features=features) for name, part in parts.items()}
    return Splits(**found, predict=found["test"])


def _check_fractions(validation: float, test: float) -> None:
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ConfigError(
            f"validation_fraction {validation} and test_fraction {test} must be above 0, together below 1."
        )


def _draw(shape: str, size: int, random: np.random.Generator) -> PILImage.Image:
    noise = random.integers(0, 80, (size, size, 3), dtype=np.uint8)
    image = PILImage.fromarray(noise)
    draw = ImageDraw.Draw(image)
    radius = int(random.integers(size // 6, size // 3 + 1))
    x, y = (int(value) for value in random.integers(radius, size - radius, 2))
    colour = tuple(int(value) for value in random.integers(120, 256, 3))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        arm = max(1, radius // 3)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
    return image
