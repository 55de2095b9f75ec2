"""Reads adapters of mlx-lm as if PEFT had written them: A and B are transposed, the scale becomes lora_alpha / r.

mlx-lm computes x W^T + scale * (x lora_a) lora_b (mlx_lm/tuner/lora.py), and with `m` DoRA's rescaling as PEFT does
(tuner/dora.py). Its modules have the names that they have in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.format import peft

TENSORS = "adapters.safetensors"

_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in")


def is_config(data: Any) -> bool:
    """True if `data` is the content of an adapter_config.json of mlx-lm."""
    return isinstance(data, Mapping) and "lora_parameters" in data and "peft_type" not in data


def config_as_peft(data: Mapping[str, Any], keys: list[str], where: str) -> dict[str, Any]:
    """The fields of PEFT's config that mean the same as `data`; `keys` are the keys of the tensors. Raises
    AdapterFormatError for an adapter that PEFT's layout cannot hold, and for a config whose meaning is not clear."""
    kind = data.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterFormatError(f"{where} is of mlx-lm, with fine_tune_type={kind!r}: that is no adapter.")
    parameters = data["lora_parameters"]
    given: dict[str, Any] = dict(parameters) if isinstance(parameters, Mapping) else {}
    rank: Any = given.get("rank")
    scale: Any = given.get("scale")
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and math.isfinite(scale)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not is_number:
        raise AdapterFormatError(f"{where}: lora_parameters is {parameters!r}, without a rank and a scale.")
    if "alpha" in given:
        raise AdapterFormatError(
            f"{where}: lora_parameters has an alpha beside its scale. Older versions of mlx-lm multiplied the update "
            "by scale * alpha / rank, later ones by scale alone, and which of them trained it is not written down. "
            "Take alpha out, and for an older one write that product as the scale."
        )
    names = sorted({key.rpartition(".")[0] for key in keys})
    embeddings = [name for name in names if name.rpartition(".")[2] in _EMBEDDINGS]
    if embeddings:
        raise AdapterFormatError(
            f"{where}: {listed(embeddings)} is an embedding. mlx-lm adapts the head that is tied to it as well, which "
            "PEFT's layout does not say: merge it in mlx-lm (mlx_lm.fuse)."
        )
    base = data.get("model")
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": given.get("dropout", 0.0),
        "target_modules": names,
        "use_dora": kind == "dora",
        "base_model_name_or_path": base if isinstance(base, str) else None,
    }


def tensors_as_peft(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors in PEFT's layout, by PEFT's keys. Raises AdapterFormatError for one that is not of a linear layer."""
    converted = {}
    foreign = []
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if not name or tensor.ndim != (1 if part == "m" else 2) or part not in _PARTS:
            foreign.append(f"{key} {tuple(tensor.shape)}")
            continue
        converted[f"{peft.PREFIX}{name}.{_PARTS[part]}"] = tensor if part == "m" else tensor.T.contiguous()
    if foreign:
        raise AdapterFormatError(f"{where} is of mlx-lm, and holds what is no linear layer's: {listed(foreign)}.")
    return converted
