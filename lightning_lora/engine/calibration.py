"""Measures what some initialisers need: inputs or gradients of layers on some data, and quantization errors.

Use it as `inject(model, config, measured=calibrate(model, config, step, batches))`. A model that was adapted with
`start=False` gives the same measurements, since its updates are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.inits import INITS, MEASURES
from lightning_lora.engine.layers import Adapter, adapters, geometry_of
from lightning_lora.engine.layers.embedding import TokenRows
from lightning_lora.engine.layers.fresh import Kind, Measured, check_measured, drawing_on
from lightning_lora.engine.present import injections
from lightning_lora.engine.targets import select
from lightning_lora.engine.trained import token_tensors
from lightning_lora.engine.tree import Tree, flags_kept, name_in, submodule
from lightning_lora.engine.weights import dense, fill, is_plain
from lightning_lora.errors import AdapterStateError, DataError, TargetError, listed

Step = Callable[[Any], Any]
"""A function that runs the model on a batch. For gradients it returns the loss, or None to skip the batch."""
Layers = Mapping[str, nn.Module]
Function = Callable[..., Tensor]


def calibrate(model: nn.Module, config: LoRAConfig, step: Step, batches: Iterable[Any]) -> dict[str, dict[str, Tensor]]:
    """Measure, on `batches`, the matrices that `config.init` needs for each layer that `config` adapts.

    Returns layer name -> measure -> matrix: the mean of x x^T over all inputs x of the layer (C), or the mean gradient
    of the loss with respect to its weight (G), in float32 on the layer's device. The model runs in eval mode. Its
    weights, gradients, modes and hooks, and torch's random state, are as before afterwards. The matrices stay in memory
    until the layers are started: C has d_in^2 numbers, G as many as the weight.

    Raises DataError if there is no batch or a matrix is not finite, TargetError for layers that no batch reached or
    that cannot be measured.
    """
    layers = _layers(model, config)
    wants = {name: m for name in INITS[config.init].measures if (m := MEASURES[name]).reads != "weights"}
    if not wants:
        return {}
    batches = list(batches) if len(wants) > 1 else batches
    devices = [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    with flags_kept(model.parameters()), evaluating(model), torch.random.fork_rng(devices):
        model.requires_grad_(False)
        found = {name: _READERS[m.reads](layers, m.function, step, batches) for name, m in sorted(wants.items())}
    unreached = [name for name in layers if any(name not in by_name for by_name in found.values())]
    if unreached:
        raise TargetError(
            f"No batch reached {listed(unreached)}, so init={config.init!r} has no measurements to start them from: "
            "leave them out with exclude_modules, or choose another init."
        )
    measured = {name: {own: by_name[name] for own, by_name in found.items()} for name in layers}
    check_measured(config, layers, measured)
    return measured


def residuals(model: nn.Module, config: LoRAConfig, weight_of: Callable[[str], Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `config.init` measures on the weights that a quantized base was made from: layer name -> measure -> matrix.
    {"E": original - dequantized weight}, say, is the quantization error.

    `weight_of("<layer>.weight")` returns the original weight. Raises TargetError for a layer that is not quantized, or
    whose original weight has another shape.
    """
    layers = _layers(model, config)
    weights = {name: module._parameters.get("weight") for name, module in layers.items()}
    plain = [name for name, W in weights.items() if W is None or is_plain(W)]
    if plain:
        raise TargetError(
            f"init={config.init!r} starts from the quantization error, and {listed(plain)} is not quantized. "
            "bitsandbytes quantizes a weight when it moves to its device: call inject, or start_adapters, after that."
        )
    found = {}
    for name, module in layers.items():
        W = weights[name]
        assert W is not None
        Q = dense(module, W)
        original = weight_of(f"{name}.weight").to(Q.device)
        if original.shape != Q.shape:
            raise TargetError(
                f"{name!r} has a weight of shape {tuple(Q.shape)}, and its original weight has the shape "
                f"{tuple(original.shape)}: give the weights from which this base was quantized."
            )
        own = {n: MEASURES[n] for n in INITS[config.init].measures if MEASURES[n].reads == "weights"}
        both = original.to(torch.float32), Q.to(torch.float32)
        found[name] = {n: _geometry(module).matrix(module, measure.function(*both)) for n, measure in own.items()}
    return found


def _layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    adapted: dict[str, nn.Module] = {name: m for name, m in adapters(model) if m.lora_pairs(name)}
    return adapted or {target.name: target.module for target in select(config, Tree.of(model)).targets}


@torch.no_grad()
def _of_inputs(layers: Layers, of: Function, step: Step, batches: Iterable[Any]) -> dict[str, Tensor]:
    unknown = [name for name, module in layers.items() if (_geometry(module) or Adapter).inputs_of is Adapter.inputs_of]
    if unknown:
        raise TargetError(
            f"The inputs of {listed(unknown)} cannot be measured: no one matrix is known that multiplies them. Leave "
            "them out with exclude_modules, or choose another init."
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.autocast(args[0].device.type if args else "cpu", enabled=False):
            x = args[0] if args else next(iter(kwargs.values()))
            X = _geometry(module).inputs_of(module, x.detach().to(torch.float32))
            _add(sums, name, of(X))
        counts[name] = counts.get(name, 0) + X.shape[0]

    with _hooked(layers, add):
        for batch in _some(batches):
            step(batch)
    return {name: total / counts[name] for name, total in sums.items()}


def _of_gradients(layers: Layers, of: Function, step: Step, batches: Iterable[Any]) -> dict[str, Tensor]:
    weights = {name: module._parameters.get("weight") for name, module in layers.items()}
    unknown = [name for name, W in weights.items() if W is None or not is_plain(W)]
    if unknown:
        raise TargetError(
            f"There is no gradient with respect to the weight of {listed(unknown)}, since it is quantized, or the "
            "layer has several weights: leave them out with exclude_modules, or choose another init."
        )
    own = [W.requires_grad_() for W in weights.values() if W is not None]
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in _some(batches):
        with torch.enable_grad():
            loss = step(batch)
        if loss is None:
            continue
        count += 1
        gradients = torch.autograd.grad(loss, own, allow_unused=True)
        for (name, module), g in zip(layers.items(), gradients):
            if g is not None:
                _add(sums, name, of(_geometry(module).matrix(module, g).to(torch.float32)))
    if not count:
        raise DataError("No batch gave a loss, so there is no gradient to start from: let the step return the loss.")
    return {name: total / count for name, total in sums.items()}


_READERS = {"inputs": _of_inputs, "gradients": _of_gradients}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = value.clone() if name not in sums else sums[name].add_(value)


def _geometry(module: nn.Module) -> Any:
    return geometry_of(type(module))


def _some(batches: Iterable[Any]) -> Iterator[Any]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise DataError("There is no batch to measure on: the training data are empty, or limited to nothing.")


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True)
        for name, module in layers.items()
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the layers and their hooks
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules of `model` are in eval mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:  # not eval(), which some modules override
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# Starts, in place, adapters that `inject(..., start=False)` left at zero.


def start_adapters(model: nn.Module, measured: Measured | None = None) -> None:
    """Start the adapters of `model` that `inject(..., start=False)` left at zero or on the meta device, unless they
    were loaded. A and B are made on the present device of their layer's weight.

    `measured` is as for `inject`, with layer names as in `model`. Raises ConfigError if a matrix is missing in it, and
    AdapterStateError if weights are still on the meta device; nothing is changed then.

    >>> import torch
    >>> from lightning_lora.engine import LoRAConfig, inject, start_adapters
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = inject(model, LoRAConfig(rank=2, target_modules=["0"]), start=False)
    >>> bool(model[0].lora_A.any())
    False
    >>> start_adapters(model)
    >>> bool(model[0].lora_A.any())
    True
    """
    waiting = [(root, injection) for root, injection in injections(model) if injection.awaits_start]
    ours = {id(getattr(m, own)) for _, m in adapters(model) for own in m.lora_names}
    absent = [name for name, p in Tree.of(model).parameters if p.is_meta and id(p) not in ours]
    if waiting and absent:
        raise AdapterStateError(f"{listed(absent)} is still on the meta device: load the weights of the model first.")
    values: list[tuple[Adapter, str, Tensor]] = []
    for root, injection in waiting:
        found = {name_in(root, n): module for n, module in adapters(submodule(model, root)) if _is_unstarted(module)}
        check_measured(injection.config, [n for n, m in found.items() if not isinstance(m, TokenRows)], measured or {})
        for name, module in found.items():
            if isinstance(module, TokenRows):
                started = token_tensors(module, module.lora, injection.config)
            else:
                kind = Kind.of(module, type(module), module.lora, injection.config)
                with drawing_on(kind.device):
                    started = kind.tensors(name, module, (measured or {}).get(name, {}))
            values += [(module, own, value) for own, value in started.items()]
    with torch.no_grad():
        for module, own, value in values:
            tensor: Tensor = getattr(module, own)
            if tensor.is_meta:
                setattr(module, own, value)
            else:
                fill(tensor, value, drawn=True)
    for root, injection in waiting:
        owner = submodule(model, root)
        there = dict(Tree.of(owner).tensors)
        for name in [name for name, original in injection.originals.items() if original.is_meta]:
            injection.originals[name] = there[name].detach().clone()
        for _, module in adapters(owner):
            if isinstance(module, TokenRows) and module.lora_rows.is_meta:
                module.swapped_in()
        injection.awaits_start = False


def _is_unstarted(module: Adapter) -> bool:
    """True if all of the layer's adapter tensors are zero or on the meta device."""
    pairs = module.lora_pairs("")
    own = [t for pair in pairs for t in (pair.A, pair.B)] or [getattr(module, name) for name in module.lora_names]
    return bool(own) and all(t.is_meta or not bool(t.any()) for t in own)
