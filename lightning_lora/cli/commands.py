"""The list of commands. Each is described by the first line of its module's docstring."""

from __future__ import annotations

import ast
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

COMMANDS = (
    "train", "evaluate", "predict", "demo", "advise", "merge", "push", "pull", "export", "combine", "resize", "repair",
    "inspect", "verify",
)  # fmt: skip

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


# Tab completion: first the commands' names; after a command, Hydra's completion of its groups, options and settings.

PROGRAM = "lightning-lora"
SCRIPTS = {
    "bash": """\
_lightning_lora() {
    local IFS=$' \\n'
    local line=${COMP_LINE:0:COMP_POINT}
    local word=${line##*[[:space:]]}
    COMPREPLY=($(compgen -W "$(COMP_LINE="$line" command lightning-lora -sc query=bash 2>/dev/null)" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _lightning_lora lightning-lora""",
    "zsh": """\
_lightning_lora() {
    local word=${LBUFFER##*[[:space:]]}
    compadd -S '' -- ${(f)"$(COMP_LINE="$LBUFFER" command lightning-lora -sc query=zsh 2>/dev/null | tr ' ' '\\n')"}
}
compdef _lightning_lora lightning-lora""",
    "fish": """\
complete -c lightning-lora -e
function __lightning_lora
    COMP_LINE=(commandline -cp) command lightning-lora -sc query=fish 2>/dev/null | string split " "
end
complete -c lightning-lora -f -a '(__lightning_lora)'""",
}
UNINSTALL = {
    "bash": "complete -r lightning-lora; unset -f _lightning_lora",
    "zsh": "compdef -d lightning-lora; unfunction _lightning_lora",
    "fish": "complete -c lightning-lora -e",
}


def complete(arguments: list[str]) -> int:
    """Do what `-sc install=bash`, `-sc uninstall=bash` or, from a shell, `-sc query=bash` asks for."""
    what, _, shell = arguments[-1].partition("=")
    if shell not in SCRIPTS or what not in ("install", "uninstall", "query"):
        print(
            f'{PROGRAM}: tab completion is for {", ".join(SCRIPTS)}. In bash: eval "$({PROGRAM} -sc install=bash)"',
            file=sys.stderr,
        )
        return 2
    if what == "query":
        print(" ".join(suggestions(os.environ.get("COMP_LINE", ""))))
    else:
        print((SCRIPTS if what == "install" else UNINSTALL)[shell])
    return 0


def suggestions(line: str) -> list[str]:
    """Completions of the last word of `line`, which starts with the program's name."""
    words = line.split()[1:] + ([""] if not line or line[-1].isspace() else [])
    if len(words) < 2:
        return [command for command in COMMANDS if command.startswith(words[0] if words else "")]
    command, *rest = words
    return _settings(command, rest) if command in COMMANDS else []


def _settings(command: str, words: list[str]) -> list[str]:
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from lightning_lora.cli.composition import CONFIG_MODULE, composed
    from lightning_lora.cli.hydra_private import completions

    config, groups = composed(command, [])
    GlobalHydra.instance().clear()
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        found = completions(loader, command, " ".join(words))
    # Hydra offers the groups of all commands.
    return [word for word in found if re.split(r"[.=/]", word)[0] in (*groups, *config)]
