"""Plans what each target becomes, before anything is changed.

Most targets of a model are alike. They are grouped into kinds, and each kind is planned and checked once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from lightning_lora.engine.config import LoRAConfig, scale_of
from lightning_lora.engine.layers import DoRA, ParameterLoRA, geometry_of
from lightning_lora.engine.layers.alora import ALoRA
from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.fresh import Kind
from lightning_lora.engine.layers.pair import AdapterSpec
from lightning_lora.engine.layers.reads import Reading
from lightning_lora.engine.swap import check_swappable, remembered
from lightning_lora.engine.torch_private import PADDING
from lightning_lora.engine.tree import Target, last_part
from lightning_lora.errors import TargetError

# Layers whose parent reads their weight without calling them: an update of their output would have no effect.

# Parents that hand a child's weight to a kernel on a fast path, and else call the child: type -> names of the children.
_READS_WEIGHT_OF: dict[type[nn.Module], tuple[str, ...]] = {nn.TransformerEncoderLayer: ("linear1", "linear2")}

# Parents in transformers that never call the child, or not where they have a kernel; by name, so nothing is imported.
_MAMBA = ("dt_proj", "x_proj", "out_proj")
_ONLY_READS = {
    "mamba.modeling_mamba.MambaMixer": _MAMBA,
    "falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": _MAMBA,
    "jamba.modeling_jamba.JambaMambaMixer": ("dt_proj",),
    "mamba2.modeling_mamba2.Mamba2Mixer": ("out_proj",),
    "bamba.modeling_bamba.BambaMixer": ("out_proj",),
    "zamba2.modeling_zamba2.Zamba2MambaMixer": ("out_proj",),
    "falcon_h1.modeling_falcon_h1.FalconH1Mixer": ("out_proj",),
    "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": ("out_proj",),
    "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": ("out_proj",),
    "wavlm.modeling_wavlm.WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "mobilebert.modeling_mobilebert.MobileBertLMPredictionHead": ("dense", "decoder"),
}


def reading(parent: Any, child: str) -> Reading:
    """How a module of the class `parent` uses its child called `child`."""
    known = remembered(parent)
    found: Reading | None = known.get((Reading, child))
    if found is None:
        found = known[Reading, child] = _reading(parent, child)
    return found


def _reading(parent: Any, child: str) -> Reading:
    weight_alone = any(issubclass(parent, kind) and child in own for kind, own in _READS_WEIGHT_OF.items())
    besides = child in ("conv1d", "conv_1d") and parent.__module__.startswith("transformers.models.")
    if issubclass(parent, nn.MultiheadAttention):  # some of its subclasses have a plain Linear there
        return Reading(weight_alone, child == "out_proj", besides)
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in parent.__mro__)
    at_times = any(child in _ONLY_READS.get(name.removeprefix("transformers.models."), ()) for name in names)
    return Reading(weight_alone, at_times, besides)


def reads_weight(parent: nn.Module, child: str) -> bool:
    """True if `parent` has a fast path that uses the weight of its child without calling the child."""
    cls: Any = type(parent)
    return reading(cls, child).weight_alone


def only_reads(parent: nn.Module, child: str) -> bool:
    """True if `parent` may never call its child, an ordinary Linear, and reads its weight instead."""
    cls: Any = type(parent)
    return reading(cls, child).at_times


def check_called(parent: nn.Module, child: str, module: nn.Module) -> None:
    """Raise TargetError if `parent` sometimes calls the convolution `module`, and sometimes reads its weight."""
    cls: Any = type(parent)
    is_depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    if is_depthwise and reading(cls, child).besides:
        raise TargetError(
            f"a {type(parent).__name__} reads its weight where it has a kernel or a cache, and calls the layer "
            "elsewhere: leave it out with exclude_modules"
        )


Plan = list[tuple[Target, Kind]]


def planned(targets: Sequence[Target], config: LoRAConfig) -> Plan:
    """Each of `targets` with its plan. Raises TargetError for the first that cannot be adapted; nothing is changed."""
    kinds: dict[Hashable, Kind] = {}
    common = None if config.rank_pattern or config.alpha_pattern else _spec(config, ())
    plan = []
    for target in targets:
        if target.parameters:
            plan.append((target, _kind(target, _spec_of_parameters(config, target), config)))
            continue
        spec = common or _spec(config, target.names_of())
        key = _alike(target, spec)
        try:
            kind = kinds.get(key)
        except TypeError:  # an attribute of the module cannot be hashed
            key = kind = None
        if kind is None:
            kind = _kind(target, spec, config)
            if key is not None:
                kinds[key] = kind
        plan.append((target, kind))
    return plan


def promised(
    targets: Sequence[Target], config: LoRAConfig
) -> Iterator[tuple[Target, AdapterSpec, dict[str, tuple[int, ...]]]]:
    """What `inject` would give to each of `targets`: its spec, and the shapes of its adapter tensors by name."""
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for target, kind in planned(targets, config):
        if id(kind) not in shapes:
            shapes[id(kind)] = kind.shapes(target.module)
        yield target, kind.spec, shapes[id(kind)]


def _alike(target: Target, spec: AdapterSpec) -> Hashable:
    """A key that is equal for targets of one kind: they differ only in the values of their tensors, their parents use
    them in the same way, and they get the same rank and scale.

    None for a module that is planned by itself: one with children, buffers, a forward on the instance, or parameters of
    another type than nn.Parameter (quantized or sharded)."""
    name, module, owner, *_ = target
    cls: Any = type(module)
    parent: Any = type(owner)
    state = module.__dict__
    if cls.__getattr__ is not _PLAIN or "forward" in state or state["_modules"] or state["_buffers"]:
        return None
    values_of = _own_values(tuple(state))  # cached: the same object for the same names, so it is part of the key
    key = [cls, reading(parent, name.rpartition(".")[2]), spec.rank, spec.alpha, values_of, *values_of(state)]
    for own, p in state["_parameters"].items():
        if p is None:
            key.append(own)
        elif type(p) is nn.Parameter:
            key += (own, p.shape, p.dtype, p.device, p.requires_grad)
        else:
            return None
    return tuple(key)


_PLAIN = nn.Module.__getattr__
_EVERY_MODULE = frozenset(vars(nn.Module()))


@functools.lru_cache(maxsize=256)
def _own_values(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function that returns the values of those attributes of a module that not every nn.Module has."""
    own = [name for name in names if name not in _EVERY_MODULE]
    if len(own) > 1 and PADDING not in own:
        return itemgetter(*own)
    # Convolutions have an attribute that is a list, which cannot be hashed.
    return lambda state: tuple(tuple(v) if isinstance(v := state[name], list) else v for name in own)


def _kind(target: Target, spec: AdapterSpec, config: LoRAConfig) -> Kind:
    """The plan of `target` alone. Raises TargetError if it cannot be adapted."""
    module = target.module
    geometry = geometry_of(type(module))
    if target.parameters and (geometry is None or not issubclass(geometry, ParameterLoRA)):
        geometry = ParameterLoRA
    assert geometry is not None, "select() only returns modules with a geometry"
    variants = variants_of(config)
    try:
        geometry = way_of(target, geometry)
        mixins = (*variants, geometry)
        for mixin in mixins:
            check_swappable(module, mixin)
        if ALoRA in variants:
            ALoRA.check_geometry(geometry)
        check_called(target.parent, last_part(target.name), module)
        geometry.check(module, spec)
        for mixin in mixins:
            mixin.check_variant(module, config)
        return Kind.of(module, geometry, spec, config, variants)
    except TargetError as error:
        raise TargetError(f"{target.name!r} ({type(module).__name__}): {error}.") from None


def way_of(target: Target, geometry: Any) -> type[Adapter]:
    """`geometry`, or a variant of it that adapts the weight, where it is not known that the update can be added to the
    output of `target`. Raises TargetError if neither is possible."""
    module: Any = target.module
    if "bank_cell" in module.__dict__:
        return geometry  # it was checked when the bank was made
    for name in target.parameters or ("weight",):
        P = module._parameters.get(name)
        if P is not None and (P.is_complex() or P.layout is not torch.strided):
            raise TargetError(
                f"its {name} holds {P.dtype} values in the layout {P.layout}, and adapters are real and dense: leave "
                "it out with exclude_modules"
            )
    parent: Any = type(target.parent)
    found: type[Adapter] = geometry.way_for(module, reading(parent, last_part(target.name)))
    return found


def variants_of(config: LoRAConfig) -> tuple[type[Adapter], ...]:
    """The variants (mixins) that go in front of every geometry: ALoRA, or DoRA, or none."""
    if config.alora_invocation_tokens:
        return (ALoRA,)
    return (DoRA,) if config.use_dora else ()


def _spec(config: LoRAConfig, names: tuple[str, ...]) -> AdapterSpec:
    rank, alpha = config.rank_of(*names), config.alpha_of(*names)  # each pattern is matched once
    return _spec_of(
        rank,
        alpha,
        scale_of(alpha, rank, rank_stabilised=config.use_rslora),
        config.dropout,
        config.rank_dropout,
        config.module_dropout,
        config.adapter_dtype == "float32",
    )


_spec_of = functools.lru_cache(maxsize=64)(AdapterSpec)  # thousands of layers have the same numbers


def _spec_of_parameters(config: LoRAConfig, target: Target) -> AdapterSpec:
    each = {name: _spec(config, target.names_of(name)) for name in target.parameters}
    return replace(_spec(config, target.names_of()), parameters=each)
