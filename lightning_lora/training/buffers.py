"""Buffers that training changes: no part of an adapter, but a run that resumes needs them.

A module may keep a moving average, a queue or a counter in a buffer. The base's own stay as they are, its batch norms
being frozen, so what differs from its value when training started is what a checkpoint has to hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.engine import adapter_tensors
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import CheckpointError, listed

_RECORD = "lora_buffers"
_SAMPLE = 1 << 20
_RESTORED = ""
"""In place of a hash: what a checkpoint brought goes into the next one, whether it changes again or not."""


def watch_buffers(module: nn.Module) -> None:
    """Note what the persistent buffers of `module` hold; of those that were noted before, the first note counts."""
    record = module.__dict__.setdefault(_RECORD, {})
    for name, buffer in _own_buffers(module):
        record.setdefault(name, _hash(buffer))


def changed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that changed since they were noted; those of more than 2^20 elements are compared by 2^20
    evenly spaced ones."""
    record: dict[str, str] = module.__dict__.get(_RECORD, {})
    own = ((name, buffer) for name, buffer in _own_buffers(module) if name in record)
    return {name: buffer.detach().clone() for name, buffer in own if record[name] != _hash(buffer)}


def restore_buffers(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put back what `changed_buffers` returned. Raises CheckpointError where a shape differs; nothing is changed then.

    One that is not there (yet) is said, and starts anew.
    """
    own = dict(_own_buffers(module))
    other = [name for name, value in saved.items() if name in own and own[name].shape != value.shape]
    if other:
        shapes = (f"{name} {tuple(saved[name].shape)} where it has {tuple(own[name].shape)}" for name in other)
        raise CheckpointError(f"The checkpoint's buffers do not fit {type(module).__name__}: {listed(shapes)}.")
    if absent := [name for name in saved if name not in own]:
        rank_zero_warn(
            f"The checkpoint holds {listed(absent)}, and {type(module).__name__} has no such buffer: it starts anew."
        )
    record = module.__dict__.setdefault(_RECORD, {})
    with torch.no_grad():
        for name in saved.keys() & own.keys():
            own[name].copy_(saved[name])
            record[name] = _RESTORED


class BufferWatch:
    """Copies of small buffers as they were when the running batch began: it may be trained on again from there."""

    def __init__(self, module: nn.Module) -> None:
        tree = Tree.of(module)
        self._owners = [
            (f"{prefix}.{name}".lstrip("."), inner, name)
            for prefix, inner in (*tree.modules, *tree.wrappers)
            for name, buffer in inner.named_buffers(recurse=False)
            if buffer.numel() <= _SAMPLE >> 4
        ]
        self._copies: dict[str, tuple[Tensor, int, Tensor]] = {}
        self.note()

    def note(self) -> None:
        for name, buffer in self._changed():
            self._copies[name] = (buffer, buffer._version, buffer.detach().clone())

    def before(self) -> dict[str, Tensor]:
        """Those that have changed since `note`, as they were then."""
        return {name: self._copies[name][2] for name, _ in self._changed() if name in self._copies}

    def _changed(self) -> Iterator[tuple[str, Tensor]]:
        for name, owner, key in self._owners:
            buffer, known = owner._buffers.get(key), self._copies.get(name)
            if buffer is not None and (known is None or buffer is not known[0] or buffer._version != known[1]):
                yield name, buffer


def _own_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers that are no part of the adapter, each under its first name, without wrappers."""
    seen = {id(tensor) for tensor in adapter_tensors(module).values()}
    tree = Tree.of(module)
    for prefix, inner in (*tree.modules, *tree.wrappers):
        for name, buffer in inner.named_buffers(prefix, recurse=False):
            last = name.rpartition(".")[2]
            if last not in inner._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield name, buffer


def _hash(buffer: Tensor) -> str:
    if buffer.is_quantized or buffer.layout is not torch.strided:
        return ""  # nothing that a module would count or average in
    values = buffer.detach().reshape(-1)
    values = values[:: max(1, values.numel() // _SAMPLE)].contiguous().cpu()
    content = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return hashlib.sha256(f"{buffer.dtype}{tuple(buffer.shape)}".encode() + content).hexdigest()
