"""Reads quantized weights as the numbers that they stand for, and stores other numbers in the same way.

The weight is looked at anew each time: bitsandbytes quantizes when a module is moved, maybe after it was adapted. No
library is imported here: a model can hold such a weight only if its library was imported.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.torch_private import unrearranged
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError, listed


def is_plain(W: Tensor) -> bool:
    """True if a weight holds its numbers themselves, in floating point of 16 bits or more."""
    return W.is_floating_point() and W.dtype.itemsize > 1 and not is_quantized(W)


def is_quantized(W: Tensor) -> bool:
    """True if a weight stands for other numbers than it holds."""
    return _is_4bit(W) or _is_8bit(W) or is_wrapper(W)


def can_be_dense(W: Tensor | None) -> bool:
    """True if it is known which numbers a weight stands for, so that `dense` can give them."""
    return W is not None and (is_plain(W) or _is_4bit(W) or _is_8bit(W) or _dequantizer(W) is not None)


def dense(module: Any, W: Tensor) -> Tensor:
    """The numbers that `W`, a parameter of `module`, stands for, in 16 bits or more."""
    if is_plain(W):
        return W
    with torch.no_grad():
        functional = sys.modules.get("bitsandbytes.functional")
        if functional is not None and _is_4bit(W):
            data, state = unpacked(W)
            return functional.dequantize_4bit(data, state)
        if functional is not None and _is_8bit(W):
            own: Any = W
            return functional.int8_vectorwise_dequant(W.data, own.SCB if own.SCB is not None else module.state.SCB)
        dequantize = _dequantizer(W)
        assert dequantize is not None, "can_be_dense was asked before"
        return dequantize()


def dtype_of(W: Any) -> torch.dtype:
    """The dtype of the numbers that `W` stands for; float32 if that is not known."""
    if W is None:
        return torch.float32
    if _is_4bit(W):
        dtype: torch.dtype = W.quant_state.original_dtype if is_rearranged(W) else W.quant_state.dtype
    else:
        dtype = W.dtype if W.is_floating_point() and W.dtype.itemsize > 1 else torch.float32
    return dtype


def shape_of(W: Any) -> tuple[int, ...]:
    """The shape of the numbers that `W` stands for."""
    return tuple(W.quant_state.shape if _is_4bit(W) else W.shape)


def stored(module: Any, W: Tensor, like: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Store the numbers `W` as `like`, a parameter of `module`, is stored. Returns the tensor, and the attributes of
    `module` that go with it. For a weight of torchao's the tensor is a plain one: how to quantize is not known."""
    if is_plain(like):
        return W.to(like.dtype), {}
    W = W.to(dense(module, like).dtype)
    if _is_4bit(like):
        made = {name: getattr(like, name) for name in _CHOICES_4BIT}
        parameter = sys.modules["bitsandbytes.nn"].Params4bit(W.contiguous(), **made).to(like.device)
        return parameter, {"quant_state": parameter.quant_state}
    if _is_8bit(like):
        kind = sys.modules["bitsandbytes.nn"].Int8Params
        state = copy.copy(module.state)  # without CB, the layer takes the new numbers in its next forward
        state.CB = state.SCB = None
        return kind(W.contiguous().cpu(), requires_grad=False).to(like.device), {"state": state}
    return W, {}


_CHOICES_4BIT = ("blocksize", "compress_statistics", "quant_type", "quant_storage")


def is_rearranged(W: Any) -> bool:
    """True if it is a 4-bit weight that bitsandbytes has rearranged for a CPU with AVX512-BF16."""
    return _is_4bit(W) and bool(getattr(W.quant_state, "packing_format_for_cpu", False))


def unpacked(W: Any) -> tuple[Tensor, Any]:
    """The data and the state of a 4-bit weight in the order in which bitsandbytes quantizes.

    For a rearranged weight, the scales are those that it computes with, one for each block, in float32. Their rounding
    to bfloat16 cannot be undone. They are not quantized again, since that would change them once more.
    """
    packed = W.quant_state
    if not is_rearranged(W):
        return W.data, packed
    state = copy.copy(packed)
    state.original_nested = False
    # bitsandbytes' inverse changes the state in place, and is right except for the scales, which it leaves transposed
    # as (blocks of a row, rows).
    data, state = unrearranged(W.data, state)
    state.absmax = packed.absmax.T.to(torch.float32).flatten()
    state.offset = state.state2 = None
    return data, state


def _is_a(W: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(W, kind)


# bitsandbytes' weights are known by the attributes that it sets on them, not by their class, which pickling loses. The
# dtype shows nothing: 4-bit numbers are stored two in a byte, or four in a bfloat16 (quant_storage).


def _is_4bit(W: Any) -> bool:
    kind = getattr(sys.modules.get("bitsandbytes.functional"), "QuantState", None)
    return kind is not None and isinstance(getattr(W, "quant_state", None), kind)


def _is_8bit(W: Tensor) -> bool:
    return W.dtype == torch.int8 and "bitsandbytes.nn" in sys.modules and hasattr(W, "SCB")


def is_wrapper(W: Tensor) -> bool:
    """True if `W` is a wrapper whose numbers lie in other tensors, as torchao's weights are. A DTensor is not one."""
    kind = type(W)
    if kind is nn.Parameter or kind is Tensor:
        return False
    return hasattr(kind, "__tensor_flatten__") and not _is_a(W, "torch.distributed.tensor", "DTensor")


def _dequantizer(W: Any) -> Callable[[], Tensor] | None:
    """The method that gives the numbers of a wrapper; None if its class has none (some of torchao's have only a
    kernel)."""
    if not is_wrapper(W):
        return None
    if _is_a(W, "torchao.utils", "TorchAOBaseTensor"):
        known: Callable[[], Tensor] | None = W.dequantize
        return known if type(W).dequantize is not Tensor.dequantize else None
    return getattr(W, "get_original_weight", None)  # torchao's NF4Tensor


# Handles weights that are sharded over processes: DTensors (fully_shard, tensor parallelism), and FSDP1.
#
# These modules of torch are not imported here: a model can hold such weights only if something imported them.


def is_sharded(t: Tensor) -> bool:
    """True if `t` is a DTensor, of which this process has a part."""
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(t, kind)


def whole(t: Any) -> Tensor:
    """The whole tensor. If `t` is sharded, every process that has a part of it must call this."""
    tensor: Tensor = t.full_tensor() if is_sharded(t) else t
    return tensor


def shard_like(value: Tensor, t: Any, *, drawn: bool = False) -> Tensor:
    """Shard `value` as `t` is sharded, if it is. Every process has the whole `value`. If it was `drawn` at random, the
    processes have different values, and all take that of the first."""
    if not is_sharded(t) or is_sharded(value):
        return value
    distribute: Any = sys.modules["torch.distributed.tensor"].distribute_tensor
    part: Tensor = distribute(value, t.device_mesh, t.placements, src_data_rank=0 if drawn else None)
    return part


@torch.no_grad()
def fill(t: Any, value: Tensor, *, drawn: bool = False) -> None:
    """Copy `value` into `t`. If `t` is sharded, each process copies its part."""
    t.copy_(shard_like(value.to(t.device, t.dtype), t, drawn=drawn))


def is_own(given: Tensor | None, own: Tensor) -> bool:
    """True if a state dict has nothing new for `own`: `given` is None, or is `own` itself, which torch's
    set_model_state_dict fills in for a missing value."""
    parts = (t.to_local() if is_sharded(t) else t for t in (given, own) if t is not None)  # type: ignore[attr-defined]
    return len({t.data_ptr() for t in parts}) == 1


def is_first() -> bool:
    """True in the process that does what only one process should do (rank 0)."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def check_complete(tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterStateError for an A or B that is no matrix: FSDP1 and ZeRO-3 leave a flat part in each process."""
    parts = [name for name, t in tensors.items() if t.dim() < 2 and name.rpartition(".")[2] in ("lora_A", "lora_B")]
    if parts:
        raise AdapterStateError(
            f"{listed(parts)} is a part of a tensor, and other processes have the rest. Ask for it where the whole is "
            "gathered: inside FullyShardedDataParallel.summon_full_params, or deepspeed.zero.GatheredParameters."
        )


def check_unsharded(model: nn.Module, advice: str, tree: Tree | None = None) -> None:
    """Raise AdapterStateError, whose message ends in `advice`, if weights of `model` are sharded, or are gathered only
    for a while (fully_shard gathers them for a forward, or at `unshard`). `tree` is Tree.of(model), if known."""
    fsdp, tensors = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    if fsdp is None and tensors is None:
        return
    tree = tree or Tree.of(model)
    kinds: Any = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if fsdp is not None)
    if (
        tree.classes_of_parameters <= {nn.Parameter}
        and not any(issubclass(cls, kinds) for cls in tree.classes)
        and not any(isinstance(wrapper, kinds) for _, wrapper in tree.wrappers)
    ):
        return  # no class in the model shards: no need to look at each module
    found = [
        name or type(model).__name__
        for name, module in (*tree.wrappers, *tree.modules)
        if isinstance(module, kinds) or any(is_sharded(p) for p in module._parameters.values() if p is not None)
    ]
    if found:
        raise AdapterStateError(f"{type(model).__name__} is sharded over processes (at {listed(found, 3)}). {advice}")


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on t's device. The meta device has no autocast to turn off."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)
