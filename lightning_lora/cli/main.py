"""`lightning-lora`: finds the command, runs it, and shows a user's error as one screen instead of a traceback."""

from __future__ import annotations

import ast
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from lightning_lora.errors import closest

COMMANDS = ("train", "evaluate", "predict", "demo", "push", "pull")

USAGE = """\
usage: lightning-lora COMMAND [group=option ...] [key=value ...]

{commands}

lightning-lora COMMAND --help shows its groups, its settings and examples."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error of the user's, 130 after an interrupt.

    Any other exception is a fault of the program and keeps its traceback; LIGHTNING_LORA_TRACEBACK=1 shows one for
    the errors of users too.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        meant = closest(command, COMMANDS, count=1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        print(f"lightning-lora: there is no command {command!r}.{hint}\n\n{overview()}", file=sys.stderr)
        return 2

    from lightning_lora.cli.explain import explain
    from lightning_lora.cli.launch import launch

    try:
        return launch(command, rest)
    except Exception as error:
        text = explain(error)
        if text is None or os.environ.get("LIGHTNING_LORA_TRACEBACK") == "1":
            raise
        print(f"\nlightning-lora {command}: {text}", file=sys.stderr)
        return 2


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
