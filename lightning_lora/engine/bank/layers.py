"""Swaps the class of a layer that a bank serves, so the layer keeps its identity, its weight and its state-dict keys.

The layer also holds its cell and the bank's routes, which are no parameters and no buffers: so checkpoints of the base
do not contain them.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.engine.bank.routing import Routes
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers import Adapter, AdapterSpec, geometry_of
from lightning_lora.engine.layers.cell import NOT_HIDDEN, Cell, Hidden, cell_kind
from lightning_lora.engine.plan import reading, way_of
from lightning_lora.engine.present import check_none_of_ours
from lightning_lora.engine.shown import METADATA
from lightning_lora.engine.swap import Host, check_swappable, is_swapped, swap, swap_back
from lightning_lora.engine.targets import select, with_plain_names
from lightning_lora.engine.torch_private import CALL, stand_in, without_torch_function
from lightning_lora.engine.tree import Target, Tree
from lightning_lora.errors import AdapterStateError, BankError, TargetError

# Guards a layer's weight from other modules that read it in their forward while adapters of a bank are in use.
#
# The weight holds no adapter, and it cannot be known which adapter the reader's result would need. So such a reader
# gets the weight's shape, dtype and device, which many models ask for in every forward, and an error for anything else.
# Code outside a forward gets the base's weight, which a bank never changes.

_VALUES = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))


class GuardedWeight(nn.Parameter):
    """The weight of the layer `bank_layer`. An operation that computes with it or changes it raises an error."""

    bank_layer: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (name == "__get__" and func.__self__.__name__ not in _VALUES) or name in METADATA:
            with without_torch_function():
                return func(*args, **(kwargs or {}))
        layers = {v.bank_layer for v in (*args, *(kwargs or {}).values()) if isinstance(v, GuardedWeight)}
        raise AdapterStateError(
            f"The weight of {' and '.join(sorted(map(repr, layers))) or 'a layer'} was read ({name}) while adapters of "
            "a bank are in use: it is the base's weight and holds none of them. Call the layer, or leave it out of the "
            "bank with exclude_modules; one adapter alone can be used with load_adapter, or with bank.folded."
        )


def in_a_forward() -> bool:
    """True if the code that reads an attribute (two frames up) runs in the forward of a module."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is CALL:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def guarded(own: nn.Parameter, name: str) -> GuardedWeight:
    """A guarded stand-in for `own`, the weight of the layer `name`."""
    with without_torch_function():
        weight: Any = stand_in(GuardedWeight, own.data, own.requires_grad)
    weight.bank_layer = name
    return weight


class Banked(Host):
    """Mixin in front of a layer's own class: adds the updates that are in use here to the layer's output."""

    bank_cell: Cell
    bank_routes: Routes

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        cell, routes = self.bank_cell, self.bank_routes
        x: Any = args[0] if args else kwargs.get(cell.input_name)
        if torch.compiler.is_compiling():
            base: Tensor = super().forward(*args, **kwargs)
            torch.ops.lightning_lora.banked(base, x, cell.key)
            return base
        routes.check_weights()
        here = threading.get_ident()
        cell.computing.add(here)
        try:
            base = super().forward(*args, **kwargs)
        finally:
            cell.computing.discard(here)
        return routes.apply(cell, base, x)


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
        if threading.get_ident() in cell.computing or not self.bank_routes.updates() or not in_a_forward():
            return own
        return guarded(own, cell.name)


_SERVED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The key of a cell -> its layer: a compiled graph can hold the number, and not the object."""


# A CUDA graph would replay the adapters under which it was recorded, so torch.compile(mode="reduce-overhead") leaves
# the operation out of its graphs. An older torch does not know this: there `Routes.apply` raises while it records.
_IN_NO_GRAPH: Any = (
    {"tags": (torch.Tag.cudagraph_unsafe,)}
    if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters
    else {}
)


# A custom operation, which torch.compile does not look into: the routing is asked for when the graph runs.
@torch.library.custom_op("lightning_lora::banked", mutates_args=("base",), **_IN_NO_GRAPH)
def _banked(base: Tensor, x: Tensor, key: int) -> None:
    layer = _SERVED[key]
    output = layer.bank_routes.apply(layer.bank_cell, base, x)
    if output is not base:
        base.copy_(output)


@_banked.register_fake
def _(base: Tensor, x: Tensor, key: int) -> None:
    return None


def check_bankable(target: Target) -> None:
    """Raise TargetError if a bank cannot serve the layer."""
    how = reading(target)
    if isinstance(target.module, NonDynamicallyQuantizableLinear) or how.at_times:
        raise TargetError(
            f"{target.name!r} lies in a {type(target.parent).__name__}, which reads its weight and never calls it: "
            "a bank cannot serve it. Leave it out with exclude_modules."
        )
    if how.weight_alone and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"{target.name!r}: the fast path of {type(target.parent).__name__} reads its weight and does not call it. "
            "Turn the fast path off first: torch.backends.mha.set_fastpath_enabled(False)."
        )
    cell_kind(target.module, target.name)
    geometry: Any = geometry_of(type(target.module))
    groups = getattr(target.module, "groups", 1)
    check_swappable(target.name, target.module, Adapter)
    try:  # a layer for which no adapter can be trained cannot be served either
        if way_of(target, geometry).lora_by_weight:
            raise TargetError(
                "its class does more with its weight than multiply by it, or takes further arguments that may do so, "
                "and then an update cannot be added row by row to its output: leave it out with exclude_modules"
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


def attach(cell: Cell, routes: Routes) -> None:
    """Let `cell` serve its layer, in place, as `routes` say."""
    module: Any = cell.module
    module.__dict__["bank_cell"], module.__dict__["bank_routes"] = cell, routes
    _SERVED[cell.key] = module
    can_guard = type(module._parameters.get("weight")) is nn.Parameter  # not a computed or a quantized weight
    swap(module, "Banked", GuardedBanked if can_guard else Banked)


def check_detachable(module: Any) -> None:
    """Raise AdapterStateError if `detach` would undo more than `attach` did."""
    if not is_swapped(type(module)):
        raise AdapterStateError(
            f"{module.bank_cell.name!r} changed its class to {type(module).__name__} since the bank was made (by a "
            "parametrization, or by inject): undo that first."
        )


def detach(module: Any) -> None:
    """Undo `attach`."""
    del module.__dict__["bank_cell"], module.__dict__["bank_routes"]
    swap_back(module)


def new_cells(
    model: nn.Module, target_modules: str | list[str], exclude_modules: str | list[str] | None
) -> dict[str, Cell]:
    """Make a cell for each layer that a bank is to serve. The model is not changed. Raises TargetError, BankError or
    AdapterStateError if one of them cannot be served."""
    tree = Tree.of(model)
    check_none_of_ours(model, tree)
    modules = dict(tree.modules)
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    selection = select(with_plain_names(config, tree), tree)
    for target in selection.targets:
        check_bankable(target)
    check_one_device((target.name, target.module) for target in selection.targets)
    cells, served = {}, frozenset(id(target.module) for target in selection.targets)
    for target in selection.targets:
        cells[target.name] = cell = cell_kind(target.module, target.name)(target.name, target.module)
        cell.hidden, cell.served, cell.sequence_first = hidden(modules, target.name), served, sequence_first(modules)
    return cells


# Finds layers of which the model's structure shows that the first dimension of their input does not count the rows.

_SEQUENCE_FIRST = {
    "fsmt.modeling_fsmt.DecoderLayer",
    "fsmt.modeling_fsmt.EncoderLayer",
    "led.modeling_led.LEDEncoderSelfAttention",
    "longformer.modeling_longformer.LongformerSelfAttention",
    "xlnet.modeling_xlnet.XLNetLayer",
}
"""Classes of transformers whose layers are called with the sequence first; by name, so nothing is imported."""


_EXPERT = re.compile(r"(?!.*shared)(?!mixture).*experts?\d*(mlp|layer|ffn|_\w*)?", re.IGNORECASE)
_ROUTER = re.compile(r"(\w+_)?(gate|gating|router|routing|switch)(_\w+)?")


def hidden(modules: Mapping[str, nn.Module], name: str) -> Hidden:
    """Why the rows cannot be found in the input of the layer `name`, if so; `modules` are the model's, by name."""
    parts = name.split(".")
    ancestors = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
    if any(map(_is_sequence_first, ancestors)):
        return Hidden("is called with the sequence first (build the layer with batch_first=True)")
    if any(map(_EXPERT.fullmatch, parts)) or any(_EXPERT.fullmatch(type(m).__name__) for m in ancestors[1:]):
        return Hidden("is one of several experts, each of which is called with the tokens that are sent to it")
    for outer, inner in itertools.pairwise(ancestors):
        if isinstance(inner, nn.ModuleList | nn.ModuleDict) and any(
            _ROUTER.fullmatch(child) for child in outer._modules
        ):
            return Hidden(where_flat="lies beside a router, which may call it with some of the tokens of the batch")
    for ancestor in ancestors:
        cls: Any = type(ancestor)
        if packing := _packs(cls):
            return Hidden(
                where_flat=f"lies in a {cls.__name__}, which packs the positions of all rows into one "
                f"dimension (it takes {packing}); bank.rows_inside says to which row each belongs"
            )
    return NOT_HIDDEN


def sequence_first(modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a module that takes the sequence before the rows; None if there is none."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    for name, module in modules.items():
        if (isinstance(module, kinds) and not module.batch_first) or _is_sequence_first(module):
            return name
    return None


def _is_sequence_first(module: nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
        return True
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return any(name.removeprefix("transformers.models.") in _SEQUENCE_FIRST for name in names)


def _packs(cls: type[nn.Module]) -> str | None:
    """The argument of the class's forward that shows that it takes rows of unequal length without padding; or None."""
    try:
        arguments = inspect.signature(cls.forward).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in ("cu_seqlens", "grid_thw") if name in arguments), None)
