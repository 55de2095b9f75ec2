"""Handles weights that are sharded over processes: DTensors (fully_shard, tensor parallelism), and FSDP1.

These modules of torch are not imported here: a model can hold such weights only if something imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError, listed


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
