"""Swaps the class of a layer that a bank serves, so the layer keeps its identity, its weight and its state-dict keys.

The layer also holds its cell, which is no parameter and no buffer: so checkpoints of the base do not contain it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.engine.bank.cells import CELLS, Cell
from lightning_lora.engine.bank.guard import guarded, in_a_forward
from lightning_lora.engine.bank.kinds import cell_kind
from lightning_lora.engine.bank.routing import Routes
from lightning_lora.engine.bank.structure import hidden, sequence_first
from lightning_lora.engine.bypass import check_called, only_reads, reads_weight
from lightning_lora.engine.candidates import Target
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers import geometry_of
from lightning_lora.engine.layers.base import AdapterSpec
from lightning_lora.engine.layers.swapping import check_swappable
from lightning_lora.engine.plain_names import with_plain_names
from lightning_lora.engine.plan import way_of
from lightning_lora.engine.present import check_none_of_ours
from lightning_lora.engine.swap import swapped_class
from lightning_lora.engine.targets import select
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError, BankError, TargetError

if TYPE_CHECKING:
    _Host = nn.Module
else:
    _Host = object


class Banked(_Host):
    """Mixin in front of a layer's own class: adds the updates that are in use here to the layer's output."""

    bank_cell: Cell

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        cell = self.bank_cell
        x: Any = args[0] if args else kwargs.get(cell.input_name)
        if torch.compiler.is_compiling():
            base: Tensor = super().forward(*args, **kwargs)
            torch.ops.lightning_lora.banked(base, x, cell.key)
            return base
        cell.routes.check_weights()
        here = threading.get_ident()
        cell.computing.add(here)
        try:
            base = super().forward(*args, **kwargs)
        finally:
            cell.computing.discard(here)
        return cell.routes.apply(cell, base, x)


class GuardedBanked(Banked):
    """`Banked`, with a weight that other modules cannot read in their forward while adapters are in use."""

    @property
    def weight(self) -> nn.Parameter:
        if "weight" not in self._parameters:  # deleted, or made a buffer
            raise AttributeError("weight")
        own: Any = self._parameters["weight"]
        if torch.compiler.is_compiling() or type(own) is not nn.Parameter:
            return own
        cell = self.bank_cell
        if threading.get_ident() in cell.computing or not cell.routes.updates() or not in_a_forward():
            return own
        return guarded(own, cell.name)


# A custom operation, which torch.compile does not look into: the routing is asked for when the graph runs.
@torch.library.custom_op("lightning_lora::banked", mutates_args=("base",))
def _banked(base: Tensor, x: Tensor, key: int) -> None:
    cell = CELLS[key]
    output = cell.routes.apply(cell, base, x)
    if output is not base:
        base.copy_(output)


@_banked.register_fake
def _(base: Tensor, x: Tensor, key: int) -> None:
    return None


def check_bankable(target: Target) -> None:
    """Raise TargetError if a bank cannot serve the layer."""
    child = target.name.rpartition(".")[2]
    check_swappable(target.module, target.name)
    if isinstance(target.module, NonDynamicallyQuantizableLinear) or only_reads(target.parent, child):
        raise TargetError(
            f"{target.name!r} lies in a {type(target.parent).__name__}, which reads its weight and never calls it: "
            "a bank cannot serve it. Leave it out with exclude_modules."
        )
    if reads_weight(target.parent, child) and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"{target.name!r}: the fast path of {type(target.parent).__name__} reads its weight and does not call it. "
            "Turn the fast path off first: torch.backends.mha.set_fastpath_enabled(False)."
        )
    cell_kind(target.module, target.name)
    geometry: Any = geometry_of(type(target.module))
    groups = getattr(target.module, "groups", 1)
    try:  # a layer for which no adapter can be trained cannot be served either
        check_called(target.parent, child, target.module)
        if way_of(target, geometry).lora_by_weight:
            raise TargetError(
                "its class does more with its weight than multiply by it, so an update cannot be added row by row to "
                "its output: leave it out with exclude_modules"
            )
        geometry.check(target.module, AdapterSpec(rank=groups, alpha=groups, scale=1.0))
    except TargetError as error:
        raise TargetError(f"{target.name!r} ({type(target.module).__name__}): {error}.") from None


def check_one_device(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise BankError if the layers lie on several devices: a bank keeps all adapters on one."""
    devices: dict[torch.device, str] = {}
    for name, layer in layers:
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if tensor.dim():  # a tensor of one number may lie on another device
                devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise BankError(
            f"The layers lie on several devices ({places}), and a bank keeps its adapters on one. Move the model to "
            "one device, or make a bank for each part: target_modules and exclude_modules say which layers it serves."
        )


def attach(module: Any, cell: Cell) -> None:
    """Let `cell` serve `module`, in place."""
    # The old class's forward, bound (see check_swappable), would hide the new class's.
    module.__dict__.pop("forward", None)
    module.__dict__["bank_cell"] = cell
    base_class: Any = type(module)
    can_guard = type(module._parameters.get("weight")) is nn.Parameter  # not a computed or a quantized weight
    module.__class__ = swapped_class("Banked", GuardedBanked if can_guard else Banked, base_class)


def check_detachable(module: Any) -> None:
    """Raise AdapterStateError if `detach` would undo more than `attach` did."""
    if "base_class" not in type(module).__dict__:
        raise AdapterStateError(
            f"{module.bank_cell.name!r} changed its class to {type(module).__name__} since the bank was made (by a "
            "parametrization, or by inject): undo that first."
        )


def detach(module: Any) -> None:
    """Undo `attach`."""
    module.__dict__.pop("forward", None)
    del module.__dict__["bank_cell"]
    module.__class__ = type(module).base_class


def new_cells(
    model: nn.Module, routes: Routes, target_modules: str | list[str], exclude_modules: str | list[str] | None
) -> dict[str, Cell]:
    """Make a cell for each layer that a bank is to serve. The model is not changed. Raises TargetError, BankError or
    AdapterStateError if one of them cannot be served."""
    tree = Tree.of(model)
    check_none_of_ours(model, tree)
    modules = dict(tree.modules)
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    selection = select(model, with_plain_names(config, tree), tree)
    for target in selection.targets:
        check_bankable(target)
    check_one_device((target.name, target.module) for target in selection.targets)
    cells = {}
    for target in selection.targets:
        cells[target.name] = cell = cell_kind(target.module, target.name)(target.name, target.module, routes)
        cell.hidden = hidden(modules, target.name)
    routes.served = frozenset(id(cell.module) for cell in cells.values())
    routes.sequence_first = sequence_first(modules)
    return cells
