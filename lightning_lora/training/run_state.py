"""What an exact resumption needs beside weights, optimizers and counters: random state, buffers, gradients, metrics."""

from __future__ import annotations

import ctypes
import hashlib
import pickle
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torchmetrics import Metric

from lightning_lora.engine import adapter_tensors, torch_private
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import is_sharded
from lightning_lora.errors import CheckpointError, listed
from lightning_lora.training.lightning_private import (
    live_callback_metrics,
    restored_result,
    results,
)
from lightning_lora.training.torchmetrics_private import metric_state, put_metric_state

# The state of the global random generators: Python's, torch's, numpy's and CUDA's.

RandomState = dict[str, Any]

_last_numpy: tuple[int, bytes, Any] | None = None
"""numpy's generator, the memory of its state, and the state as it was last read from there."""


def random_state() -> RandomState:
    """The state of every random generator in use, as values that `torch.load(weights_only=True)` accepts."""
    state: RandomState = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = _numpy_state(numpy)
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: RandomState) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    set_python_state(random, state["python"])
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None and _numpy_state(numpy) is not state["numpy"]:
        saved = state["numpy"]
        if not isinstance(saved, dict):
            algorithm, keys, *rest = saved
            saved = (algorithm, keys.numpy().astype("uint32"), *rest)
        numpy.random.set_state(saved)
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _numpy_state(numpy: Any) -> Any:
    """The state of numpy's generator. Asking numpy takes 50 us, too much after every batch, so it is asked only if its
    memory has changed."""
    global _last_numpy
    generator: Any = getattr(numpy.random, "get_bit_generator", lambda: None)()  # numpy has it from 1.24 on
    if type(generator) is not numpy.random.MT19937:
        return numpy.random.get_state()
    # 624 keys and a position. Where a second normal number is kept for the next call, that call changes neither.
    memory = ctypes.string_at(generator.ctypes.state_address, 625 * 4)
    if _last_numpy is not None and _last_numpy[:2] == (id(generator), memory) and not _last_numpy[2][3]:
        return _last_numpy[2]
    algorithm, keys, *rest = numpy.random.get_state()
    state = (algorithm, torch.from_numpy(keys.astype("int64")), *rest)
    _last_numpy = (id(generator), memory, state)
    return state


def set_python_state(generator: Any, state: Any) -> None:
    """Put back the state of Python's `random` or of a `random.Random`, which takes tuples and no lists."""
    version, numbers, kept = state
    generator.setstate((version, tuple(numbers), kept))


# The state of each process, brought to the first one, which writes the checkpoint.

_PATIENCE = timedelta(seconds=5)
"""How long the first process waits, after an exception, for others that may have had none."""

_exchanges = 0


def of_all_ranks(own: Any, *, may_be_alone: bool) -> list[Any]:
    """`own` of every process, by rank. With `may_be_alone`, None for processes that do not answer in time."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * distributed.get_world_size()
    if may_be_alone:
        return _left_in_store(own, ranks)
    distributed.all_gather_object(ranks, own)
    return ranks


def _left_in_store(own: Any, ranks: list[Any]) -> list[Any]:
    # A call to all processes would wait for ever for one that goes on training. So each process leaves its state in
    # the store by which the processes have met, and only the first one looks there.
    global _exchanges
    _exchanges += 1
    rank = distributed.get_rank()
    ranks[rank] = own
    if torch_private.processes_store is None:
        return ranks
    store = torch_private.processes_store()
    if rank != 0:
        with suppress(RuntimeError):  # the first process has ended, and the store with it
            store.set(f"lightning_lora/{_exchanges}/{rank}", pickle.dumps(own))
        return ranks
    for other in range(1, len(ranks)):
        key = f"lightning_lora/{_exchanges}/{other}"
        try:
            store.wait([key], _PATIENCE)
        except RuntimeError:  # torch's DistStoreError is one
            continue
        ranks[other] = pickle.loads(store.get(key))
    return ranks


# Buffers that training changes: no part of an adapter, but a run that resumes needs them.
#
# A module may keep a moving average, a queue or a counter in a buffer. The base's own buffers do not change, since its
# batch norms are frozen. So a checkpoint holds the buffers that differ from their values when training started.

_RECORD = "lora_buffers"
_SAMPLE = 1 << 20
_RESTORED = ""
"""Stands in place of a hash: a buffer from a checkpoint goes into the next one, whether it changes again or not."""


def watch_buffers(module: nn.Module) -> None:
    """Note the values of the persistent buffers of `module`; for those noted before, the first note stays."""
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

    A buffer that the module does not have (yet) starts anew, with a warning.
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
            self._copies[name] = (buffer, torch_private.version(buffer), buffer.detach().clone())

    def before(self) -> dict[str, Tensor]:
        """The buffers that have changed since `note`, as they were then."""
        return {name: self._copies[name][2] for name, _ in self._changed() if name in self._copies}

    def _changed(self) -> Iterator[tuple[str, Tensor]]:
        for name, owner, key in self._owners:
            buffer, known = owner._buffers.get(key), self._copies.get(name)
            if buffer is None:
                continue
            if known is None or buffer is not known[0] or torch_private.version(buffer) != known[1]:
                yield name, buffer


def _own_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers that are no part of the adapter, each under its first name, without wrappers."""
    seen = {id(tensor) for tensor in adapter_tensors(module).values()}
    tree = Tree.of(module)
    for prefix, inner in (*tree.modules, *tree.wrappers):
        for name, buffer in torch_private.persistent_buffers(inner):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}" if prefix else name, buffer


def _hash(buffer: Tensor) -> str:
    if buffer.is_quantized or buffer.layout is not torch.strided:
        return ""  # nothing that a module would count or average in
    values = buffer.detach().reshape(-1)
    values = values[:: max(1, values.numel() // _SAMPLE)].contiguous().cpu()
    content = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
    return hashlib.sha256(f"{buffer.dtype}{tuple(buffer.shape)}".encode() + content).hexdigest()


# The gradients of an open accumulation window: a checkpoint that is saved inside one has to hold them.


class Trained:
    """The trained parameters of a module, found once: walking a large model takes a millisecond."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def version(self) -> int:
        """A number that changes when one of them does."""
        return sum(torch_private.version(p) for p in self._parameters.values())

    def gradients(self) -> dict[str, Tensor]:
        """Copies of all gradients; of a sharded one, of this process's part."""
        present = ((name, p.grad) for name, p in self._parameters.items() if p.grad is not None)
        return {name: (g.to_local() if is_sharded(g) else g).detach().clone() for name, g in present}  # type: ignore[attr-defined]

    def set_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Put back what `gradients` returned."""
        for name, saved in gradients.items():
            if (parameter := self._parameters.get(name)) is None:
                continue
            gradient = saved.to(parameter.device).clone()
            if is_sharded(parameter):
                sharded: Any = parameter
                gradient = type(sharded.data).from_local(gradient, sharded.device_mesh, sharded.placements)
            parameter.grad = gradient


# The metrics of an epoch that has not ended: the sums of `self.log(..., on_epoch=True)` and of torchmetrics.
#
# Early stopping, plateau schedules and the choice of the best checkpoint depend on them, and Lightning's checkpoints do
# not hold them.

_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
_REDUCTIONS = {torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.max: "max", max: "max"}

Metrics = dict[str, Any]


class EpochMetrics:
    """The metrics of the running epoch of a Trainer."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        named = trainer.lightning_module.named_modules()
        self._modules = {name: module for name, module in named if isinstance(module, Metric)}

    def state(self) -> Metrics:
        """The values that the running epoch has gathered. Logged values are not changed in place, so they need no copy;
        torchmetrics adds in place, but to lists only at their end."""
        logged = {
            key: (metric, metric.has_reset, metric.value if metric.is_tensor else None, _count(metric))
            for key, metric in results(self._trainer).items()
        }
        modules = {name: metric_state(metric) for name, metric in self._modules.items()}
        return {"logged": logged, "modules": modules}

    def load(self, state: Metrics) -> None:
        """Put back what `plain` made of a state."""
        device = self._trainer.lightning_module.device
        for name, (count, values) in state["modules"].items():
            if (metric := self._modules.get(name)) is None:
                continue
            here = {k: [e.to(device) for e in v] if isinstance(v, list) else v.to(device) for k, v in values.items()}
            put_metric_state(metric, count, here)
        logged = results(self._trainer)
        for key, saved in state["logged"].items():
            value = saved["value"]
            if value is None:
                value = self._modules.get(saved["meta"]["metric_attribute"])
            if value is not None:
                logged[key] = restored_result(saved, value, device)


def plain(state: Metrics) -> Metrics:
    """`state` as values that a checkpoint can hold."""
    logged = {}
    for key, (metric, has_reset, value, count) in state["logged"].items():
        fields = {name: getattr(metric.meta, name) for name in _FIELDS}
        fields["reduce_fx"] = _REDUCTIONS.get(metric.meta.reduce_fx, "min")
        logged[key] = {"meta": fields, "has_reset": has_reset, "value": value, "count": count}
    return {"logged": logged, "modules": state["modules"]}


def _count(metric: Any) -> Tensor | None:
    return getattr(metric, "cumulated_batch_size", None)


def callback_metrics(trainer: Trainer) -> dict[str, Any]:
    """The metrics that callbacks see. After an exception they are not summed over processes: some may not take part."""
    if trainer.world_size > 1 and trainer.state.status == TrainerStatus.INTERRUPTED:
        return live_callback_metrics(trainer)
    return trainer.callback_metrics


def has_stopped(callback: Any) -> bool:
    """True if `callback` is an EarlyStopping that has ended the run, or is about to."""
    return isinstance(callback, EarlyStopping) and (
        callback.stopped_epoch > 0 or callback.wait_count >= callback.patience
    )
