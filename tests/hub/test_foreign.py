"""LoRAs of other layouts, whose scales have no place in PEFT's: every reader names the layout and its scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
)
from lightning_lora.errors import AdapterFormatError
from lightning_lora.format.folder import foreign_layout
from lightning_lora.format.inspection import check_adapter
from lightning_lora.rewriting.combine import combine_adapters
from lightning_lora.rewriting.export import export_adapter

A, B = torch.ones(2, 8), torch.ones(8, 2)
ALPHA = torch.tensor(4.0)
PEFT = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}

FILES: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "kohya": (
        {"lora_unet_q.lora_down.weight": A, "lora_unet_q.lora_up.weight": B, "lora_unet_q.alpha": ALPHA},
        {"ss_network_alpha": "4"},
        r"kohya's layout \('lora_unet_q.*alpha / rank.*convert_sd_adapter_to_peft",
    ),
    "comfy": ({"diffusion_model.q.lora_down.weight": A, "diffusion_model.q.lora_up.weight": B}, {}, "kohya's layout"),
    "a text encoder of kohya's": ({"lora_te1_q.lora_down.weight": A, "lora_te1_q.lora_up.weight": B}, {}, "kohya's"),
    "old diffusers": (
        {"unet.q.processor.to_q_lora.down.weight": A, "unet.q.processor.to_q_lora.up.weight": B},
        {},
        r"diffusers' older layout \(.*network_alphas",
    ),
    "older diffusers": ({"q.lora.up.weight": B, "q.lora.down.weight": A}, {}, "diffusers' older layout"),
    "diffusers": (
        {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B},
        {"lora_adapter_metadata": "{}"},
        r"diffusers' layout \('unet\.q",
    ),
    "lycoris": ({"lycoris_q.hada_w1_a": A, "lycoris_q.hada_w1_b": B}, {}, "LyCORIS's layout.*no product of one A"),
    "mlx": ({"q.lora_a": A.T.contiguous(), "q.lora_b": B.T.contiguous()}, {}, r"mlx-lm's layout.*scale \* rank"),
    "PEFT's with alphas": ({**PEFT, "base_model.model.q.alpha": ALPHA}, {}, r"scale beside its factors \(.*q\.alpha"),
    "PEFT's with a scale in A": ({**PEFT, "base_model.model.q.lora_A.scale": ALPHA}, {}, r"\(.*q\.lora_A\.scale"),
    "scales in the header": (PEFT, {"network_alphas": json.dumps({"q": 4})}, r"header of its file \(network_alphas\)"),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = net()
    inject(model, LoRAConfig(rank=2, target_modules=["q"]))
    return save_adapter(model, tmp_path / "adapter")


def rewritten(adapter: Path, name: str) -> str:
    """`adapter` with other tensors; returns what is said of them."""
    tensors, metadata, message = FILES[name]
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt", **metadata})
    return message


READERS: dict[str, Callable[[Path], Any]] = {
    "load_adapter": lambda folder: load_adapter(net(), folder),
    "a bank": lambda folder: AdapterBank(net()).add("it", folder),
    "combine": lambda folder: combine_adapters([folder], folder.parent / "out", weights=[1.0]),
    "export": lambda folder: export_adapter(folder, folder.parent / "out", consumer="vllm"),
    "the check of what is pulled": check_adapter,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FILES)
def test_every_reader_names_the_layout_and_its_scale(name: str, reader: str, adapter: Path) -> None:
    message = rewritten(adapter, name)
    with pytest.raises(AdapterFormatError, match=message):
        READERS[reader](adapter)


@pytest.mark.parametrize("name", [name for name in FILES if "PEFT" not in name and "header" not in name])
def test_a_file_by_itself_is_named_in_a_folder_and_out_of_one(name: str, tmp_path: Path) -> None:
    tensors, metadata, message = FILES[name]
    save_file(tensors, tmp_path / "style.safetensors", metadata=metadata)
    for path in (tmp_path, tmp_path / "style.safetensors"):
        with pytest.raises(AdapterFormatError, match=message):
            load_adapter(net(), path)


@pytest.mark.parametrize("name", [name for name in FILES if "header" not in name])
def test_a_state_dict_of_another_layout_is_named(name: str) -> None:
    model = net()
    inject(model, LoRAConfig(rank=2, target_modules=["q"]))
    tensors, _, message = FILES[name]
    given = {key.removeprefix("base_model.model.").replace("A.weight", "A"): value for key, value in tensors.items()}
    if name == "PEFT's with alphas":
        given = {**adapter_state_dict(model), "q.alpha": ALPHA}
    elif name == "diffusers":
        given = tensors
    with pytest.raises(AdapterFormatError, match=message):
        load_adapter_state_dict(model, given)


def test_a_parameter_called_alpha_that_was_trained_whole_is_no_scale(tmp_path: Path) -> None:
    def model() -> nn.Module:
        made: Any = net()
        made.lora_down, made.act = nn.Linear(8, 8), nn.Module()
        made.act.alpha = nn.Parameter(torch.ones(3))
        return made  # type: ignore[no-any-return]

    first = model()
    inject(first, LoRAConfig(rank=2, target_modules=["q"], modules_to_save=["act", "lora_down"]))
    with torch.no_grad():
        first.act.alpha.mul_(2)  # type: ignore[union-attr, operator]
    save_adapter(first, tmp_path / "it")
    assert "base_model.model.act.alpha" in load_file(tmp_path / "it" / "adapter_model.safetensors")
    second: Any = model()
    load_adapter(second, tmp_path / "it")
    assert second.act.alpha.eq(2).all()
    load_adapter_state_dict(second, adapter_state_dict(first))


def test_a_folder_on_the_hub_is_judged_by_the_names_of_its_files() -> None:
    assert "a LoRA in one file (style.safetensors)" in str(foreign_layout(["README.md", "style.safetensors"]))
    assert foreign_layout(["adapter_config.json", "README.md"]) is None
