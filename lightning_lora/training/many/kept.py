"""What a module keeps from step to step, beside weights and buffers: numbers, tensors, lists, generators, metrics.

A step of one adapter must not go on from what a step of another has left: a generator of the module's own, a queue of
embeddings, a mean of the loss. So each adapter begins where it would begin alone, and what then differs is kept by
adapter. Looked into are the module, the parts of it that no library defines, and their own objects.
"""

from __future__ import annotations

import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import IOBase
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lora.engine import torch_private
from lightning_lora.engine.several import Several
from lightning_lora.errors import TrainingError, listed
from lightning_lora.training.run_state import set_python_state

_LARGEST = 2**20
"""A tensor with more elements is not copied: a step that writes to it is refused."""
_LONGEST = 1000
"""Of a longer list or dict the entries are kept, and not what is inside of them."""
# fmt: off
_LIBRARIES = frozenset((
    "torch", "torchvision", "torchaudio", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning",
    "lightning_lora", "builtins", "transformers", "tokenizers", "datasets", "diffusers", "timm", "peft",
    "accelerate", "numpy", "PIL", "omegaconf", "hydra", "pandas",
))
# fmt: on
_ABSENT: Any = object()
Place = tuple[int, str]
"""id(module), and the name of its attribute."""


@dataclass
class _Saved:
    """A value that can change in place, and what it held; `content` is None where that is too large to be copied."""

    value: Any
    content: Any
    version: int = 0


class Kept:
    """The attributes of a module, those of each adapter where they differ."""

    def __init__(self, several: Several) -> None:
        self._several = several
        self._known = {*vars(pl.LightningModule()), "_hparams", "_hparams_initial", "log", "log_dict", "wanted_mode"}
        self._modules: dict[int, nn.Module] = {}
        self._first: dict[Place, Any] = {}
        self._start: dict[Place, Any] = {}
        self._left: dict[Place, Any] = {}
        self._after: dict[str, dict[Place, Any]] = {}
        self._own: dict[Place, dict[str, Any]] = {}
        self._with_metrics = False

    def begin(self, *, with_metrics: bool = False) -> None:
        """Before the adapters of a step, or of an evaluation, in which each has metrics of its own. Raises
        TrainingError where something else has changed what they keep apart."""
        self._with_metrics, self._after = with_metrics, {}
        self._start = self._taken()
        self._first = {**self._start, **self._first}
        for place in list(self._own):
            now = self._start.get(place, _ABSENT)
            if not self._is_seen(place) or _same(now, self._left[place]):
                continue
            if not (_is_blank(now) or _same(now, self._first.get(place, _ABSENT))):
                raise TrainingError(
                    f"{self._named(place)} is another with each adapter after a step, and a hook has changed it since, "
                    "where the module has the first adapter alone. Train each in a run of its own with LoRACallback."
                )
            del self._own[place]  # it was cleared, for all

    def put(self, name: str) -> None:
        """Let the adapter `name` begin where it ended last."""
        self._put({place: self._own.get(place, {}).get(name, common) for place, common in self._start.items()})

    def _put(self, values: dict[Place, Any]) -> None:
        for module, keys in self._attributes():
            for key in keys:
                if values.get((id(module), key), _ABSENT) is _ABSENT:
                    del vars(module)[key]
        for (module_id, key), value in values.items():
            if value is not _ABSENT:
                vars(self._modules[module_id])[key] = _put_back(value)

    def note(self, name: str) -> None:
        """Note where the adapter `name` has ended."""
        self._after[name] = self._taken()

    def differing(self) -> str | None:
        """What is another after the steps of the adapters noted so far, if anything is."""
        ends = list(self._after.values())
        for place in dict.fromkeys(place for end in ends for place in end):
            if any(not _same(end.get(place, _ABSENT), ends[0].get(place, _ABSENT)) for end in ends[1:]):
                return self._named(place)
        return None

    def end(self) -> None:
        """After the last adapter: the module has what the first one has left."""
        first = next(iter(self._after))
        for place in dict.fromkeys(place for end in self._after.values() for place in end):
            ends = {name: end.get(place, _ABSENT) for name, end in self._after.items()}
            before = self._own.get(place, {})
            if before or not all(_same(end, ends[first]) for end in ends.values()):
                self._own[place] = {**before, **ends}
                self._left[place] = ends[first]
        self._put(self._after[first])

    # In checkpoints: metrics, as those of a single adapter are. Other attributes are the module's to save.

    def state_dict(self) -> dict[str, Any]:
        """The metrics of each adapter as a checkpoint can hold them, and the names of other attributes that differ."""
        names = {id(m): name for name, m in self._several.model.named_modules() if isinstance(m, Metric)}
        metrics = {
            f"{names[place[0]]}/{place[1]}": {
                "own": {n: _plain(v) for n, v in own.items()},
                "left": _plain(self._left[place]),
            }
            for place, own in self._own.items()
            if place[0] in names
        }
        return {"metrics": metrics, "others": [self._named(place) for place in self._own if place[0] not in names]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state_dict`, with values on `device`. Raises TrainingError where the module loads attributes that
        were another with each adapter."""
        module: Any = self._several.model
        if state["others"] and is_overridden("on_load_checkpoint", module):
            raise TrainingError(
                f"{listed(state['others'])} was another with each adapter when the checkpoint was saved, and the "
                "module's own on_load_checkpoint knows that of one. Train each in a run of its own with LoRACallback."
            )
        modules = dict(module.named_modules())
        for path, saved in state["metrics"].items():
            name, _, key = path.rpartition("/")
            if name in modules:
                place = id(modules[name]), key
                self._modules[place[0]] = modules[name]
                self._left[place] = _saved(move_data_to_device(saved["left"], device), set(), "")
                self._own[place] = {
                    n: _saved(move_data_to_device(v, device), set(), "") for n, v in saved["own"].items()
                }

    # Where something is kept.

    def _taken(self) -> dict[Place, Any]:
        seen: set[int] = set()
        return {
            (id(module), key): _saved(vars(module)[key], seen, f"{_name(module)}.{key}")
            for module, keys in self._attributes()
            for key in keys
        }

    def _attributes(self) -> Iterator[tuple[nn.Module, list[str]]]:
        exchanged = self._several.exchanged
        for module in self._several.model.modules():
            if self._with_metrics if isinstance(module, Metric) else not _is_of_library(module):
                self._modules[id(module)] = module
                yield module, [k for k in vars(module) if k not in self._known and (id(module), k) not in exchanged]

    def _is_seen(self, place: Place) -> bool:
        return self._with_metrics or not isinstance(self._modules[place[0]], Metric)

    def _named(self, place: Place) -> str:
        return repr(f"{_name(self._modules[place[0]])}.{place[1]}")


def _name(module: nn.Module) -> str:
    cls = type(module)
    return str(getattr(cls, "base_class", cls).__name__)


def _is_of_library(value: Any) -> bool:
    cls = type(value)
    return getattr(cls, "base_class", cls).__module__.partition(".")[0] in _LIBRARIES


def _is_of_python(value: Any) -> bool:
    """True for objects of the standard library: loggers, locks, files, paths."""
    top = type(value).__module__.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    return top in sys.stdlib_module_names and (file is None or file.startswith(os.path.dirname(os.__file__)))


_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
    np.random.RandomState: (lambda g: g.get_state(legacy=False), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), set_python_state),
}
_CONTAINERS = (list, deque, dict, set)
_PLAIN = frozenset((int, float, bool, str, bytes, complex, type(None), FunctionType, MethodType, torch.dtype))
_NOT_LOOKED_INTO = (nn.Module, type, FunctionType, MethodType, ModuleType)


def _saved(value: Any, seen: set[int], name: str) -> Any:
    """`value` as `_put_back` takes it. Raises TrainingError for an iterator, which cannot be set back."""
    if type(value) in _PLAIN or id(value) in seen:
        return value
    if isinstance(value, Tensor):
        seen.add(id(value))
        content = value.detach().clone() if value.numel() <= _LARGEST else None
        return _Saved(value, content, torch_private.version(value))
    if isinstance(value, np.ndarray):
        return _Saved(value, value.copy()) if value.size <= _LARGEST else value
    if type(value) in _GENERATORS:
        return _Saved(value, _GENERATORS[type(value)][0](value))
    if isinstance(value, _CONTAINERS):
        seen.add(id(value))
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        is_long = len(value) > _LONGEST
        return _Saved(value, {key: one if is_long else _saved(one, seen, name) for key, one in parts})
    if isinstance(value, Iterator) and not isinstance(value, (IOBase, CombinedLoader)):
        raise TrainingError(
            f"{name} is an iterator ({type(value).__name__}): each adapter of a step would take other items of it. "
            "Give the data to the Trainer (a CombinedLoader for several loaders), or train each adapter in a run of "
            "its own with LoRACallback."
        )
    is_foreign = _is_of_library(value) or (_is_of_python(value) and type(value) is not SimpleNamespace)
    if isinstance(value, _NOT_LOOKED_INTO) or not hasattr(value, "__dict__") or is_foreign:
        return value
    seen.add(id(value))
    return _Saved(value, {key: _saved(one, seen, f"{name}.{key}") for key, one in vars(value).items()})


def _put_back(saved: Any) -> Any:
    if not isinstance(saved, _Saved):
        return saved
    value, content = saved.value, saved.content
    if isinstance(value, Tensor):
        if torch_private.version(value) != saved.version:
            if content is None:
                raise TrainingError(
                    f"The training step writes to a tensor of shape {tuple(value.shape)} that the module keeps, and it "
                    "is too large to be kept for each adapter. Train each in a run of its own with LoRACallback."
                )
            with torch.no_grad():
                value.detach().copy_(content)
            saved.version = torch_private.version(value)
    elif isinstance(value, np.ndarray):
        value[...] = content
    elif type(value) in _GENERATORS:
        _GENERATORS[type(value)][1](value, content)
    else:
        parts = {key: _put_back(one) for key, one in content.items()}
        own: Any = value if isinstance(value, _CONTAINERS) else vars(value)
        own.clear()
        if isinstance(value, (list, deque)):
            value.extend(parts.values())
        else:
            own.update(parts.values() if isinstance(value, set) else parts)
    return value


def _plain(saved: Any) -> Any:
    """What a checkpoint can hold of a metric's attribute."""
    if not isinstance(saved, _Saved):
        return saved if isinstance(saved, (int, float, str)) else None
    if isinstance(saved.value, list):
        return [_plain(one) for one in saved.content.values()]
    return {k: _plain(v) for k, v in saved.content.items()} if isinstance(saved.value, dict) else saved.content


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, _Saved) and isinstance(b, _Saved):
        if a.content is None or b.content is None:
            return a.value is b.value and a.version == b.version
        return type(a.value) is type(b.value) and _same(a.content, b.content)
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(one, b[key]) for key, one in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, (int, float, str, bytes, complex)) and (a == b or (a != a and b != b))


def _is_blank(saved: Any) -> bool:
    """True for what is left when something was cleared: nothing, zeros, empty lists."""
    if saved is _ABSENT or not isinstance(saved, _Saved):
        return saved is _ABSENT or saved is None or (isinstance(saved, (int, float, str)) and not saved)
    if isinstance(saved.value, (Tensor, np.ndarray)):
        return saved.content is not None and not saved.content.any()
    if type(saved.value) in _GENERATORS:
        return False
    return all(map(_is_blank, saved.content.values()))
