"""The texts that the base learns from and is measured on: only what every CPython installation has.

The base learns the documentation topics (prose). The standard library's source is the domain that it has not seen:
here there is only a small fixed sample of it, to measure on.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

SOURCE_FILES = (
    "argparse.py",
    "bisect.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "json/decoder.py",
    "sched.py",
    "shlex.py",
    "textwrap.py",
)
SOURCE_BYTES_PER_FILE = 4096


class Topics(NamedTuple):
    """Documentation topics by name; no long paragraph of one half occurs in the other."""

    train: dict[str, str]
    held_back: dict[str, str]


def documentation_topics(held_back_fraction: float = 0.05) -> Topics:
    """Split the documentation topics by name; the same names are held back on every machine.

    `held_back_fraction` is the share of all characters that is held back for validation.
    """
    texts = _without_repeats(dict(topics))
    budget = held_back_fraction * sum(map(len, texts.values()))
    held_back: dict[str, str] = {}
    # crc32 of the name, not a shuffle: a topic that another Python adds does not move the others.
    for name in sorted(texts, key=lambda name: zlib.crc32(name.encode())):
        # Many short topics measure more than one long one.
        if len(texts[name]) <= budget / 3:
            held_back[name] = texts[name]
            budget -= len(texts[name])
    return Topics({name: text for name, text in texts.items() if name not in held_back}, held_back)


def _without_repeats(texts: dict[str, str]) -> dict[str, str]:
    """Leave each long paragraph in the longest topic that has it.

    A fifth of the topics' text is there twice (`specialnames` holds all of `customization`, for example): split as
    they are, the validation text would have been trained on.
    """
    seen: set[str] = set()
    unique: dict[str, str] = {}
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        kept = []
        for paragraph in texts[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) < 60 or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        # A topic of which only headings are left teaches nothing.
        if any(len(paragraph) >= 60 for paragraph in kept):
            unique[name] = "\n\n".join(kept)
    return dict(sorted(unique.items()))


def source_sample() -> list[bytes]:
    """A few kilobytes from the middle of each of `SOURCE_FILES`, where there is code rather than a licence.

    Raises FileNotFoundError if this Python was installed without its source.
    """
    library = Path(sysconfig.get_path("stdlib"))
    sample = []
    for name in SOURCE_FILES:
        content = (library / name).read_bytes()
        start = max(0, (len(content) - SOURCE_BYTES_PER_FILE) // 2)
        sample.append(content[start : start + SOURCE_BYTES_PER_FILE])
    return sample
