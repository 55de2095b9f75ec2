"""Lists layers whose parent reads their weight without calling them: an update of their output would have no effect."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from lightning_lora.engine.swap import remembered
from lightning_lora.errors import TargetError

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


class Reading(NamedTuple):
    """How a parent module uses a child of a given name."""

    weight_alone: bool
    """True if the parent has a fast path that uses the child's weight without calling the child."""
    at_times: bool
    """True if the parent may never call the child, an ordinary Linear, and reads its weight instead."""
    besides: bool
    """True if the parent, where the child is a convolution, sometimes calls it and sometimes reads its weight."""


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
