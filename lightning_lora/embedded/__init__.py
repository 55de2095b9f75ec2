"""The base model that ships in the package, so that the first command works with no network.

`BASE` is an ordinary transformers folder: a byte-level causal language model of 2.8 million parameters with its
tokenizer. tools/train_base.py in the repository is the script that made it; `base/README.md` is its model card.

`general.jsonl` holds a few passages of English works in the public domain, each with its author, its year, and the
repository of GITenberg (Project Gutenberg's texts on GitHub) that it was copied from. Breaks of lines became spaces.
"""

from __future__ import annotations

import json
from pathlib import Path

BASE: Path = Path(__file__).parent / "base"
"""Folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."""

NAME = "embedded"
"""What settings call it."""
GENERAL: Path = Path(__file__).parent / "general.jsonl"
"""One JSON object in each line: `text`, `work`, `author`, `year`, `source`."""


def general_texts() -> tuple[str, ...]:
    """The passages in `general.jsonl`, about 5,000 bytes: English prose, on which it shows whether a language model
    has forgotten what it could."""
    lines = GENERAL.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


__all__ = ["BASE", "GENERAL", "NAME", "general_texts"]
