"""Switches the adapters of a model off for a while, in this thread or task alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.inject import originals_of
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.layers.frozen import read_by_switch
from lightning_lora.engine.present import RECORD, injections
from lightning_lora.engine.swap import is_swapped
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.weights import is_sharded
from lightning_lora.errors import AdapterStateError, listed


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of `model` off inside a `with` block: for the reference pass of DPO, or to compare.

    Inside, `model` computes what it did before `inject`, bit for bit. Layers run, and weights read, without their
    adapters; tensors that are trained whole (modules_to_save, biases, token rows) act with their values from before
    training. No tensor is changed: state dicts, `parameters()` and `save_adapter` still give the trained values. The
    training mode stays as it is, so the base's own dropout stays on; norms whose statistics `inject` froze stay frozen.

    The block holds for the thread or the task that entered it, and may be nested. If a backward pass outside computes a
    forward from inside again (activation checkpointing), it runs without adapters again. Compiled code runs inside with
    graph breaks; with fullgraph=True it raises torch's error.

    Args:
        model: The module that `inject` was called on, or a module around it.

    Raises:
        AdapterStateError: `model` has no adapters, is only a part of the module that was adapted, or is merged.
            `merge`, `merged` and `remove` raise it while any thread is inside the block.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, disabled, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> x = torch.ones(1, 4)
        >>> before = model(x)
        >>> report = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> with torch.no_grad():
        ...     _ = model[0].lora_B.fill_(1.0)  # as if it had been trained
        >>> with torch.no_grad(), disabled(model):
        ...     reference = model(x)
        >>> torch.equal(reference, before), torch.equal(model(x), before)
        (True, False)
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
            f"{listed(map(repr, outside), 3)} of this {kind} was adapted as a part of a larger module, and other parts "
            "may be trained too: pass the module that inject was called on (under a Trainer, the LightningModule)."
        )
    changed = [name for name, module in adapted if not is_swapped(type(module))]
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
    """id(tensor) -> its value before training, for each tensor that is trained whole."""
    found: dict[int, Tensor] = {}
    for name, injection in injections(tree.root, tree):
        for tensor, original in originals_of(submodule(tree.root, name), injection):
            if original.is_meta or is_sharded(tensor):
                raise AdapterStateError(
                    f"{listed(injection.trained_whole, 3)} of {type(tree.root).__name__} is trained whole, and is "
                    f"{'on the meta device still' if original.is_meta else 'sharded over processes'}: its values "
                    "before training cannot be used here. Train it unsharded, or keep a copy of the base for this."
                )
            found[id(tensor)] = original
    return found
