"""Plans what each target becomes, before anything is changed.

Most targets of a model are alike. They are grouped into kinds, and each kind is planned and checked once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers import DoRA, ParameterLoRA, geometry_of
from lightning_lora.engine.layers.alora import ALoRA
from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.fresh import Kind
from lightning_lora.engine.layers.pair import AdapterSpec
from lightning_lora.engine.layers.reads import Reading
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


def reading(target: Target) -> Reading:
    """How the parent of `target` uses it."""
    child, parent, module = last_part(target.name), target.parent, target.module
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(parent).__mro__]
    own = [name.removeprefix("transformers.models.") for name in names if name.startswith("transformers.models.")]
    if isinstance(parent, nn.MultiheadAttention):
        at_times = child == "out_proj"  # some of its subclasses have a plain Linear there
    else:
        at_times = any(child in _ONLY_READS.get(name, ()) for name in own)
    is_depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    return Reading(
        weight_alone=any(isinstance(parent, cls) and child in names for cls, names in _READS_WEIGHT_OF.items()),
        at_times=at_times,
        besides=is_depthwise and child in ("conv1d", "conv_1d") and names[0].startswith("transformers.models."),
    )


Plan = list[tuple[Target, Kind]]


def planned(targets: Sequence[Target], config: LoRAConfig) -> Plan:
    """Each of `targets` with its plan. Raises TargetError for the first that cannot be adapted; nothing is changed."""
    kinds: dict[Hashable, Kind] = {}
    plan = []
    for target in targets:
        names = [target.names_of(), *(target.names_of(parameter) for parameter in target.parameters)]
        spec, *each = (config.spec_of(*own) for own in names)
        if each:
            spec = replace(spec, parameters=dict(zip(target.parameters, each)))
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


def _alike(target: Target, spec: AdapterSpec) -> Hashable:
    """A key that is equal for targets of one kind: they differ only in the values of their tensors, their parents use
    them in the same way, and they get the same rank and scale.

    None for a module that is planned by itself: one with children, buffers, a forward on the instance, parameters of
    another type than nn.Parameter (quantized or sharded), or of which single parameters are adapted."""
    module = target.module
    cls: Any = type(module)
    state, parameters = module.__dict__, module._parameters
    is_plain = {type(p) for p in parameters.values()} <= {nn.Parameter, type(None)}
    if cls.__getattr__ is not nn.Module.__getattr__ or "forward" in state or spec.parameters or not is_plain:
        return None
    if state["_modules"] or state["_buffers"]:
        return None
    key = [cls, reading(target), spec.rank, spec.alpha]
    for name in state.keys() - _EVERY_MODULE:
        value = state[name]
        key += (name, tuple(value) if isinstance(value, list) else value)  # convolutions have a list
    for name, p in parameters.items():
        key += (name, None if p is None else (p.shape, p.dtype, p.device, p.requires_grad))
    return tuple(key)


_EVERY_MODULE = vars(nn.Module()).keys()


def _kind(target: Target, spec: AdapterSpec, config: LoRAConfig) -> Kind:
    """The plan of `target` alone. Raises TargetError if it cannot be adapted."""
    module = target.module
    geometry = geometry_of(type(module))
    if target.parameters and (geometry is None or not issubclass(geometry, ParameterLoRA)):
        geometry = ParameterLoRA
    assert geometry is not None, "select() only returns modules with a geometry"
    variants: tuple[type[Adapter], ...] = (ALoRA,) if config.alora_invocation_tokens else (DoRA,) * config.use_dora
    try:
        geometry = way_of(target, geometry)
        if ALoRA in variants and (geometry.lora_by_weight or not geometry.lora_by_position):
            raise TargetError(
                "alora_invocation_tokens adapts linear layers alone, whose update can be added at some positions and "
                "not at others: leave it out with exclude_modules"
            )
        geometry.check(module, spec)
        for mixin in (*variants, geometry):
            mixin.check_variant(module, config)
        return Kind.of(module, geometry, spec, config, variants)
    except TargetError as error:
        raise TargetError(f"{target.name!r} ({type(module).__name__}): {error}.") from None


def way_of(target: Target, geometry: type[Adapter]) -> type[Adapter]:
    """`geometry`, or a variant of it that adapts the weight, where it is not known that the update can be added to the
    output of `target`. Raises TargetError if neither is possible."""
    module = target.module
    if "bank_cell" in module.__dict__:
        return geometry  # it was checked when the bank was made
    for name in target.parameters or ("weight",):
        P = module._parameters.get(name)
        if P is not None and (P.is_complex() or P.layout is not torch.strided):
            raise TargetError(
                f"its {name} holds {P.dtype} values in the layout {P.layout}, and adapters are real and dense: leave "
                "it out with exclude_modules"
            )
    how = reading(target)
    if how.besides:
        raise TargetError(
            f"a {type(target.parent).__name__} reads its weight where it has a kernel or a cache, and calls the layer "
            "elsewhere: leave it out with exclude_modules"
        )
    return geometry.way_for(module, how)


def promised(
    targets: Sequence[Target], config: LoRAConfig
) -> Iterator[tuple[Target, AdapterSpec, dict[str, tuple[int, ...]]]]:
    """What `inject` would give to each of `targets`: its spec, and the shapes of its adapter tensors by name."""
    return ((target, kind.spec, kind.shapes(target.module)) for target, kind in planned(targets, config))
