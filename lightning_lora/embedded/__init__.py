"""The base model that ships in the package, so that the first command works with no network.

`BASE` is an ordinary transformers folder: a byte-level causal language model of 2.8 million parameters with its
tokenizer. tools/train_base.py in the repository is the script that made it; `base/README.md` is its model card.
"""

from __future__ import annotations

from pathlib import Path

BASE: Path = Path(__file__).parent / "base"
"""Folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`."""

NAME = "embedded"
"""What settings call it."""

__all__ = ["BASE", "NAME"]
