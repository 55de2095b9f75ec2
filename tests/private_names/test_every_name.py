"""Canaries: every private name of another library that we use is there, and stands in one of our files alone.

A failure names the library, its version and the name that moved.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_lora
from lightning_lora.borrowed import PURPOSES, attribute, found, needed, replace
from lightning_lora.engine.bank.layers import _SEQUENCE_FIRST
from lightning_lora.engine.plan import _ONLY_READS
from lightning_lora.engine.tree import _INSIDE
from lightning_lora.errors import MovedError
from tests.private_names.moved import moved

PACKAGE = Path(lightning_lora.__file__).parent
ROOMS = (
    *("engine/torch_private.py", "training/lightning_private.py", "training/torchmetrics_private.py"),
    "training/many/rounds_private.py",
    *("format/transformers_private.py", "hub/hub_private.py", "cli/hydra_private.py"),
)

ASKED_LATE = (
    "hydra._internal.core_plugins.bash_completion:BashCompletion._query",
    "hydra._internal.utils:_locate",
    "hydra._internal.utils:get_args_parser",
    "lightning.pytorch.callbacks:RichProgressBar._get_train_description",
    "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher",
    "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher.launch",
    "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher",
    "torch.autograd.forward_ad:_current_level",
    "torch.nn:Conv2d._conv_forward",
    "torch.nn:ConvTranspose2d._output_padding",
    "torch.nn:Module._apply",
    "torch.nn:Module._load_from_state_dict",
    "torch.nn:Module._save_to_state_dict",
    "torch.nn:RNNBase._update_flat_weights",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:WeightConverter",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.core_model_loading:rename_source_key",
)


@pytest.mark.parametrize("path", sorted({*PURPOSES, *ASKED_LATE}))
def test_the_name_is_there(path: str):
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        pytest.fail(moved(path))


@pytest.mark.parametrize("name", sorted({*_ONLY_READS, *_SEQUENCE_FIRST}))
def test_a_class_of_transformers_that_is_known_by_its_name_has_that_name(name: str):
    model = name.partition(".")[0]
    if importlib.util.find_spec(f"transformers.models.{model}") is None:
        pytest.skip(f"transformers {metadata.version('transformers')} has no {model} yet")
    module, _, cls = f"transformers.models.{name}".rpartition(".")
    assert hasattr(importlib.import_module(module), cls), moved(f"transformers.models.{name}")


@pytest.mark.parametrize("name", [name for name in _INSIDE if name.startswith(("torch.", "lightning."))])
def test_a_wrapper_that_is_known_by_its_name_has_that_name(name: str):
    module, _, cls = name.rpartition(".")
    assert hasattr(importlib.import_module(module), cls), moved(name)


def test_no_other_file_has_private_names_of_others():
    # A module keeps what it is made of in these; the rest are CPython's own, and documented or older than our oldest.
    known = {"_parameters", "_buffers", "_modules"} | {"_replace", "_fields", "_getframe", "_current_frames"}
    known |= {"_DummyThread"}
    files = [f for f in PACKAGE.rglob("*.py") if "conf" not in f.relative_to(PACKAGE).parts]
    trees = {str(f.relative_to(PACKAGE)): ast.parse(f.read_text("utf-8")) for f in files}
    ours = {name for tree in trees.values() for node in ast.walk(tree) for name in _defined(node)}
    other = [
        f"{file}:{node.lineno} {name}"
        for file, tree in trees.items()
        if file not in ROOMS
        for node in ast.walk(tree)
        for name in _used(node)
        if name.startswith("_") and not name.startswith("__") and name not in known | ours
    ]
    hosts = [line for line in other if line.startswith("training/loops.py")]  # for the type checker alone
    assert [line for line in other if line not in hosts] == []
    assert len(hosts) == 3


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        yield node.attr


def _used(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_lora"):
        yield from (part for name in node.names for part in f"{node.module}.{name.name}".split("."))
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def test_a_name_that_is_gone_is_named_with_the_version_of_its_library():
    path = "torch.nn:a_name_of_yesterday"
    assert found(path, "does this", 1) == 1
    with pytest.raises(MovedError, match=re.escape(f"torch {metadata.version('torch')} has no torch.nn.a_name")):
        needed(path, "does this")()
    one = SimpleNamespace(a=1)
    with pytest.raises(MovedError, match=r"SimpleNamespace\.b, by which"):
        replace(one, "does this", a=2, b=3)
    assert vars(one) == {"a": 1}
    assert attribute(one, "a", "does this") == 1
    del PURPOSES[path]


def test_a_moved_error_can_be_sent_to_another_process():
    import pickle

    error = MovedError("torch.nn.a", "does this")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
