"""Which commands there are, and what each says of itself in the first line of its module's docstring."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

COMMANDS = ("train", "evaluate", "predict", "demo", "merge", "push", "pull", "export", "combine")

USAGE = """\
usage: lightning-lora COMMAND [group=option ...] [key=value ...]

{commands}

lightning-lora COMMAND --help shows its groups, its settings and examples."""


def overview() -> str:
    """Usage, and each command with the first line of its module's docstring; imports none of them."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {docstring(name).splitlines()[0]}" for name in COMMANDS]
    return USAGE.format(commands="\n".join(lines))


def docstring(command: str) -> str:
    """The docstring of a command's module, read from its source: importing one may import torch."""
    spec = find_spec(f"lightning_lora.cli.{command}")
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
