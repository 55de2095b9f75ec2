"""Layers that their parent reads without calling them, where an adapter would never be seen."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from lightning_lora.engine.swap import remembered
from lightning_lora.errors import TargetError

# Parents that read a child's weight in kernels of their own, where they do not call it: type -> names of the children.
_READS_WEIGHT_OF: dict[type[nn.Module], tuple[str, ...]] = {nn.TransformerEncoderLayer: ("linear1", "linear2")}

# Those of transformers that never call the child, or do not where they have a kernel: by name, as nothing is imported.
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


class Reading(NamedTuple):
    """How a parent uses a child of that name."""

    weight_alone: bool
    """It uses the weight without calling the child."""
    at_times: bool
    """It may never call the child, though that is a Linear like any other."""
    besides: bool
    """Where it is a convolution, it calls it at times, and reads its weight at others."""


def reading(parent: Any, child: str) -> Reading:
    """How a module of the class `parent` uses its child of that name."""
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
    """Whether `parent` uses the weight of its child without calling the child."""
    cls: Any = type(parent)
    return reading(cls, child).weight_alone


def only_reads(parent: nn.Module, child: str) -> bool:
    """Whether `parent` may never call its child, though that is a Linear like any other."""
    cls: Any = type(parent)
    return reading(cls, child).at_times


def check_called(parent: nn.Module, child: str, module: nn.Module) -> None:
    """Raise TargetError where `parent` calls the convolution `module` at times, and reads its weight at others."""
    cls: Any = type(parent)
    is_depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1
    if is_depthwise and reading(cls, child).besides:
        raise TargetError(
            f"a {type(parent).__name__} reads its weight where it has a kernel or a cache, and calls it elsewhere: "
            "leave it out with exclude_modules"
        )
