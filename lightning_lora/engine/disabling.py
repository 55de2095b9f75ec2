"""The bare base for a while: adapters act as if they were not there, in this thread or task alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.inject import injections, originals_of
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.layers.whole import read_by_switch
from lightning_lora.engine.present import RECORD
from lightning_lora.engine.sharded import is_sharded
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.errors import AdapterStateError, listed


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what it did before `inject`, bit for bit: for the reference pass of DPO, or to compare.

        with torch.no_grad(), disabled(model):
            reference = model(batch)

    Layers are called, and weights are read, without their adapters; what is trained whole (modules_to_save, biases,
    token rows) acts with its values of before. No tensor is changed: state dicts, `parameters()` and `save_adapter`
    give what was trained. Modes stay as they are, dropout of the base's own among them, and norms whose statistics
    `inject` froze stay frozen.

    It holds for the thread or the task that entered it, and may be nested. What is differentiated here may be computed
    again in a backward pass outside (activation checkpointing): without adapters, as it was. Code that torch.compile
    compiled runs with breaks inside, or, with fullgraph=True, raises torch's error.

    Raises AdapterStateError where `model` has no adapters, is a part of what was adapted, or is merged; and, for a
    call of `merge`, `merged` or `remove` while some thread is inside.
    """
    is_compiled = "torch._dynamo" in sys.modules
    with (torch.compiler.disable(_off) if is_compiled else _off)(model):
        yield


def _off(model: nn.Module) -> AbstractContextManager[None]:
    tree = Tree.of(model)
    _check(tree)
    held = _originals(tree)
    for _, module in tree.modules if held else ():
        tensors = (*module._parameters.items(), *module._buffers.items())
        if names := {name: held[id(t)] for name, t in tensors if id(t) in held}:
            read_by_switch(module, names)
    return switch.off(tree.root, frozenset(id(module) for _, module in tree.modules))


def _check(tree: Tree) -> None:
    kind = type(tree.root).__name__
    adapted = tree.of_classes(is_adapter)
    records = list(injections(tree.root, tree))
    if not adapted and records:
        raise AdapterStateError(f"{kind} is merged, or its adapted layers were replaced: there is nothing to disable.")
    if not adapted:
        raise AdapterStateError(f"{kind} has no adapters to disable: call inject(model, config) first.")
    known = {id(module) for _, injection in records for module in injection.adapted.values()}
    outside = [name for name, module in adapted if id(module) not in known and RECORD not in module.__dict__]
    if outside:
        raise AdapterStateError(
            f"{listed(map(repr, outside), 3)} of this {kind} was adapted as a part of a larger module, which knows "
            "what else is trained: pass the one that inject was called on (under a Trainer, the LightningModule)."
        )
    changed = [name for name, module in adapted if "base_class" not in type(module).__dict__]
    if changed:
        raise AdapterStateError(
            f"{listed(map(repr, changed))} changed its class after it was adapted (a parametrization, for example): "
            "what it computes without its adapter is not known. Undo that first."
        )
    for _, wrapper in tree.wrappers:
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise AdapterStateError(
                f"nn.DataParallel runs copies of {kind} in threads of its own, in which its adapters would act: call "
                "the module inside of it (model.module), or use DistributedDataParallel."
            )


def _originals(tree: Tree) -> dict[int, Tensor]:
    """The values before training of what is trained whole, by the identity of the tensor."""
    found: dict[int, Tensor] = {}
    for name, injection in injections(tree.root, tree):
        for tensor, original in originals_of(submodule(tree.root, name), injection):
            if original.is_meta or is_sharded(tensor):
                raise AdapterStateError(
                    f"{listed(injection.trained_whole, 3)} of {type(tree.root).__name__} is trained whole, and is "
                    f"{'on the meta device still' if original.is_meta else 'sharded over processes'}: its values "
                    "before training cannot act here. Train it unsharded, or keep a copy of the base for this."
                )
            found[id(tensor)] = original
    return found
