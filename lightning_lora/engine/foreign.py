"""Recognises LoRAs in other layouts than PEFT's by the names of their tensors.

Such files keep the scale of a layer in a tensor beside its factors (`alpha`), in the header of the file, or in a config
of their own. PEFT's layout has no place for it there, so a reader of A and B alone would lose the scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lightning_lora.engine.wrappers import NAMES as WRAPPERS
from lightning_lora.errors import listed

_CONVERT = (
    "Convert it: PEFT's examples/stable_diffusion/convert_sd_adapter_to_peft.py does, and so does loading it with "
    "diffusers and saving its modules with PEFT's save_pretrained, which write each alpha into adapter_config.json"
)


class _Layout(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    """Matches the names of its tensors."""
    scale: str
    """Where it keeps the scale, in words."""
    advice: str = _CONVERT


_LAYOUTS = (
    _Layout(
        "LyCORIS's layout",
        re.compile(r"\.(hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|oft_blocks|glora_\w+)$"),
        "its update is no product of one A and one B",
        "Merge it into its base with the program that it was made for",
    ),
    _Layout(
        "kohya's layout",
        re.compile(r"^lora_(unet|te\d*|transformer|prior)_|^lycoris_|(^|\.)lora_(down|up|mid)\.weight$"),
        "the scale of a layer is its alpha / rank",
    ),
    _Layout(
        "diffusers' older layout",
        re.compile(r"(_lora\d*|\.lora|lora_linear_layer)\.(down|up)\.weight$"),
        "the scale of a layer is its alpha (network_alphas) / rank, or 1 where it has none",
    ),
    _Layout(
        "diffusers' layout",
        re.compile(
            r"^(unet|transformer(_2)?|text_encoder(_[23])?|prior|diffusion_model)\.(?!h\.).*\.lora_[AB]\.weight$"
        ),
        "its scales are in the header of its file, or alpha is the rank",
    ),
    _Layout(
        "mlx-lm's layout",
        re.compile(r"\.lora_[ab]$"),
        "the scale is lora_parameters.scale in its config",
        "Load the folder as mlx-lm wrote it, adapter_config.json beside adapters.safetensors; or write the transposed "
        "lora_a and lora_b under PEFT's keys, with scale * rank as lora_alpha",
    ),
)
_PEFT = "base_model.model."
_ALPHA = re.compile(r"(.*?)(?:\.lora_[AB])?\.(?:(?:lora_|network_)?alpha|(?:lora_)?scal(?:e|ing))$")
_FACTOR = re.compile(r"(.*)\.lora_(?:embedding_)?[AB](?:_\w+)?(?:\.\w+)*$")
_IN_HEADER = ("network_alphas", "lora_adapter_metadata")


def other_prefix(given: Iterable[str], wanted: Iterable[str]) -> str | None:
    """A sentence that says what PEFT's keys `given` have more or less than the keys `wanted`, of which they match none.
    None if they differ in another way."""
    names, there = list(given), set(wanted)
    if not names or not there:
        return None
    inside = sorted(part for part in WRAPPERS if any(part in name.split(".") for name in names))
    if inside and {_without(name, inside) for name in names} <= there:
        what = listed(repr(f"{part}.") for part in inside)
        return f"They have {what} in them, which DDP, FSDP or torch.compile puts into the names of what it wraps"
    stem, ending = names[0].removeprefix(_PEFT), ""
    for name in there:
        short = name.removeprefix(_PEFT)
        if stem.endswith(f".{short}") and {n.replace(stem.removesuffix(short), "", 1) for n in names} <= there:
            ending = stem.removesuffix(short)
            return f"They have {ending!r} before the names of this model: they belong to a model around it"
        if names[0] == short and {_PEFT + n for n in names} <= there:
            return f"They lack PEFT's prefix {_PEFT!r}"
        more = short.removesuffix(stem)
        if short.endswith(f".{stem}") and {n.replace(_PEFT, _PEFT + more, 1) for n in names} <= there:
            return f"They lack {more!r}, which this model has before its names: they belong to a part of it"
    return None


def _without(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def foreign_layout_of(
    keys: Iterable[Any], metadata: Mapping[str, Any] = MappingProxyType({}), *, beside: Iterable[Any] = ()
) -> str | None:
    """If tensors called `keys`, in a file with this `metadata`, are a LoRA in another layout: a clause that names the
    layout, where its scale is and what to do. None if they may be in PEFT's layout or ours. `beside` are names of
    further tensors, which are as they should be."""
    names = [key for key in keys if isinstance(key, str)]
    theirs = [name for name in names if not name.startswith("base_model.")]  # PEFT's own prefix
    for layout in _LAYOUTS:
        example = next(filter(layout.pattern.search, theirs), None)
        if example is not None:
            return f"a LoRA in {layout.name} ({example!r}), which is not read here: {layout.scale}. {layout.advice}"
    layers = {match[1] for match in map(_FACTOR.match, (*names, *map(str, beside))) if match}
    alpha = next((name for name in names if (match := _ALPHA.match(name)) and match[1] in layers), None)
    if alpha is not None:
        return (
            f"a LoRA with a scale beside its factors ({alpha!r}, as kohya and diffusers write it), which would be "
            f"dropped: PEFT's layout has it in lora_alpha and alpha_pattern. {_CONVERT}"
        )
    named = next((name for name in _IN_HEADER if name in metadata), None)
    if named is not None:
        return (
            f"a LoRA of diffusers with scales in the header of its file ({named}), which would be dropped: PEFT's "
            f"layout has them in adapter_config.json. {_CONVERT}"
        )
    return None
