"""`lightning-lora`: finds the command, runs it, and shows a user's error as one screen instead of a traceback."""

from __future__ import annotations

import os
import select
import sys

import lightning_lora
from lightning_lora.checked import closest
from lightning_lora.cli.commands import COMMANDS, overview

OTHER_NAMES = {
    **dict.fromkeys(("fit", "finetune", "fine-tune", "tune", "sweep", "resume"), "train"),
    **dict.fromkeys(("eval", "test", "validate", "measure"), "evaluate"),
    **dict.fromkeys(("generate", "infer", "inference", "chat"), "predict"),
    **dict.fromkeys(("upload", "publish"), "push"),
    **dict.fromkeys(("download", "fetch"), "pull"),
    "convert": "export",
}
"""A command's name in other programs -> its name here."""
COMPLETION = ("-sc", "--shell-completion")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for an error of the user's, 1 where jobs of a sweep failed in
    other processes or `verify` finds that an adapter is not applied, 130 after an interrupt, 141 where nobody reads the
    output any more (`| head`), 143 on SIGTERM.

    Any other exception is a fault of the program and keeps its traceback; LIGHTNING_LORA_TRACEBACK=1 shows one for
    the errors of users too.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = _main(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 141


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"lightning-lora {lightning_lora.__version__}")
        return 0
    command, *rest = arguments
    if any(argument in COMPLETION for argument in arguments):
        from lightning_lora.cli.commands import complete

        return complete(arguments)
    if command not in COMMANDS:
        meant = OTHER_NAMES.get(command.lower()) or next(iter(closest(command, COMMANDS, count=1)), None)
        hint = f" Did you mean {meant}?" if meant else ""
        if "=" in command or command.startswith("-"):
            hint = f" The command comes first: lightning-lora train {command}"
        print(f"lightning-lora: there is no command {command!r}.{hint}\n\n{overview()}", file=sys.stderr)
        return 2

    from lightning_lora.cli.explain import explain
    from lightning_lora.cli.launch import launch

    try:
        return launch(command, rest)
    except SystemExit as error:
        if error.code is None and type(error).__name__ == "SIGTERMException":  # from Lightning, which is slow to import
            return 143
        raise
    except Exception as error:
        text = explain(error)
        if text is None or os.environ.get("LIGHTNING_LORA_TRACEBACK") == "1":
            raise
        print(f"\nlightning-lora {command}: {text}", file=sys.stderr)
        return 2


def _output_is_closed() -> bool:
    """True if the reader of our output has gone, as `head` does. The rest of the output then goes to the null
    device."""
    try:
        sys.stdout.flush()
        is_closed = _has_no_reader(sys.stdout.fileno())
    except BrokenPipeError:
        is_closed = True
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
