"""Imports go down only, and what is light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_lora

PACKAGE = Path(lightning_lora.__file__).parent
FLOORS = [
    "errors",
    "borrowed",
    "checked",
    "files",
    "page",
    "engine",
    "format",
    "hub",
    "rewriting",
    "analysis",
    "training",
    "recipes",
    "cli",
]
HEAVY = ("lightning", "pytorch_lightning", "transformers", "peft", "huggingface_hub", "datasets", "hydra", "matplotlib")


def floor_of(module: str) -> str | None:
    """The floor that "lightning_lora.engine.inject" stands on."""
    first, *rest = module.split(".")
    return rest[0] if first == "lightning_lora" and rest and rest[0] in FLOORS else None


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def going_up(source: str, module: str) -> list[str]:
    own = floor_of(module)
    if own is None:
        return []
    package = module.rpartition(".")[0]
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(ast.parse(source), package)
        if (floor := floor_of(name)) is not None and FLOORS.index(floor) > FLOORS.index(own)
    ]


def test_no_import_goes_up():
    # conf is a link out of the package in a checkout, and holds no code.
    files = [file for file in PACKAGE.rglob("*.py") if "conf" not in file.relative_to(PACKAGE).parts]
    assert len(files) > 10
    modules = {".".join(["lightning_lora", *f.relative_to(PACKAGE).with_suffix("").parts]): f for f in files}
    assert [line for module, file in modules.items() for line in going_up(file.read_text("utf-8"), module)] == []


def test_an_import_that_goes_up_is_seen():
    assert going_up("from lightning_lora.hub import files", "lightning_lora.engine.state")
    assert going_up("def f():\n    from ..training import callback", "lightning_lora.hub.adapters")
    assert going_up("import lightning_lora.cli.main", "lightning_lora.training.callback")
    assert not going_up("from ..engine import inject", "lightning_lora.hub.adapters")
    assert going_up("from lightning_lora.hub import client", "lightning_lora.format.folder")


@pytest.mark.parametrize("room", ["engine", "format", "hub", "rewriting", "analysis"])
def test_no_files_of_a_room_import_each_other_in_a_circle(room: str):
    files = {
        ".".join(["lightning_lora", *f.relative_to(PACKAGE).with_suffix("").parts]): f for f in PACKAGE.rglob("*.py")
    }
    names = {module.removesuffix(".__init__"): module for module in files if floor_of(module) == room}
    graph = {}
    for module in names.values():
        if not module.endswith(".__init__"):  # it hands names on
            found = [
                name for _, name in imports(ast.parse(files[module].read_text("utf-8")), module.rpartition(".")[0])
            ]
            graph[module] = {n if n in names else n.rpartition(".")[0] for n in found} - {module}
    assert len(list(TopologicalSorter(graph).static_order())) > len(graph) > 3  # raises CycleError, with the circle


def test_no_file_is_longer_than_what_is_read_in_one_go():
    assert not [f.name for f in PACKAGE.rglob("*.py") if len(f.read_text("utf-8").splitlines()) > 400]


def test_the_top_imports_the_floors_only_when_asked():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    guarded = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    assert not [name for node in guarded for _, name in imports(node, "lightning_lora") if floor_of(name)]


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import lightning_lora", ("torch", *HEAVY)),
        ("import lightning_lora.engine", HEAVY),
        ("from lightning_lora import inject, LoRAConfig, merged", HEAVY),
        ("import lightning_lora.format.inspection, lightning_lora.format.matching", HEAVY),
    ],
)
def test_an_import_does_not_load_what_it_does_not_need(statement: str, forbidden: tuple[str, ...]):
    code = f"{statement}\nimport sys\nprint([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
