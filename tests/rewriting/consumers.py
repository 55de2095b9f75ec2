"""The consumers' own arithmetic, written again from their sources: what each adds to the weights of a base.

Each takes an adapter folder and gives the update of each weight that it would apply, as if it was right.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Updates = dict[str, Tensor]
"""The name of a module -> what is added to its weight, (out, in), or (words, width) for an embedding."""

_A = re.compile(r"base_model\.model\.(.*)\.lora_(embedding_)?A(\.weight)?")


def _read(folder: Path) -> tuple[dict, dict[str, tuple[Tensor, Tensor, bool]]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for key in list(tensors):
        if found := _A.fullmatch(key):
            A, B = tensors.pop(key), tensors.pop(re.sub("A(?=$|.weight$)", "B", key))
            pairs[found[1]] = (A.double(), B.double(), bool(found[2]))
    assert not tensors, f"no consumer takes {list(tensors)}"
    return config, pairs


def _delta(A: Tensor, B: Tensor, scale: float, is_embedding: bool) -> Tensor:
    return scale * (B @ A).T if is_embedding else scale * B @ A


def vllm(folder: Path) -> Updates:
    """Before it read patterns: one scale, of the config's r."""
    config, pairs = _read(folder)
    assert isinstance(config["target_modules"], list)
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert all(len(A) <= config["r"] for A, _, _ in pairs.values()), "its buffers have r rows"
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return {name: _delta(A, B, scale, e) for name, (A, B, e) in pairs.items()}


def vllm_033(folder: Path) -> Updates:
    """Since it reads patterns."""
    config, pairs = _read(folder)

    def first(field: str, name: str, default: float) -> float:
        found = (v for key, v in config[field].items() if re.match(rf"(.*\.)?({key})$", name))
        return next(found, default)

    updates = {}
    for name, (A, B, e) in pairs.items():
        rank, alpha = first("rank_pattern", name, config["r"]), first("alpha_pattern", name, config["lora_alpha"])
        updates[name] = _delta(A, B, alpha / (math.sqrt(rank) if config["use_rslora"] else rank), e)
    return updates


def lorax(folder: Path) -> Updates:
    """One scale, of an r that becomes the padded rank once a kind of module is loaded; kinds whole or not at all."""
    config, pairs = _read(folder)
    r = config["r"]
    kinds: dict[str, dict[str, tuple[Tensor, Tensor, bool]]] = {}
    for name, pair in pairs.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), {})[name] = pair
    updates = {}
    for layers in kinds.values():
        scale = config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)
        if len(layers) < 2:  # the models here have two layers
            continue
        rank = len(torch.stack([A for A, _, _ in layers.values()])[0])  # raises where ranks differ
        r = 8 if rank <= 8 else -(-rank // 16) * 16
        updates |= {name: _delta(A, B, scale, False) for name, (A, B, e) in layers.items() if not e}
    return updates


def llama_cpp(folder: Path) -> Updates:
    """lora_alpha over the rank of the tensor; an alpha of 0 counts as none."""
    config, pairs = _read(folder)
    alpha = config["lora_alpha"]
    return {name: _delta(A, B, alpha / B.shape[1] if alpha else 1.0, e) for name, (A, B, e) in pairs.items()}


SERVERS: dict[str, list[Callable[[Path], Updates]]] = {
    "vllm": [vllm, vllm_033],
    "lorax": [lorax],
    "llama.cpp": [llama_cpp],
}


def with_updates(model: nn.Module, updates: Updates) -> nn.Module:
    """A copy of `model` whose weights have the `updates` in them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, update in updates.items():
            weight = model.get_submodule(name).weight
            transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
            weight.copy_((weight.double() + (update.T if transposed else update)).to(weight.dtype))
    return model
