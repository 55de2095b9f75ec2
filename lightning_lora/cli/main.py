"""`lightning-lora`: finds the command, runs it, and shows a user's error as one screen instead of a traceback."""

from __future__ import annotations

import os
import sys

from lightning_lora.cli.commands import COMMANDS, overview
from lightning_lora.errors import closest


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error of the user's, 130 after an interrupt, 143 on
    SIGTERM.

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
    except SystemExit as error:
        if error.code is None and type(error).__name__ == "SIGTERMException":  # Lightning's, which is slow to import
            return 143
        raise
    except Exception as error:
        text = explain(error)
        if text is None or os.environ.get("LIGHTNING_LORA_TRACEBACK") == "1":
            raise
        print(f"\nlightning-lora {command}: {text}", file=sys.stderr)
        return 2
