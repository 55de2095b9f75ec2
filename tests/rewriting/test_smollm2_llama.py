"""An exported adapter of SmolLM2 does in llama.cpp what it does in torch: on float32, on bfloat16, and on 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import disabled
from lightning_lora.cli.merged_model import merge_adapter
from lightning_lora.recipes.models import smollm2
from tests.rewriting import llama_cpp
from tests.rewriting.smollm2_llama import MARKS, Trial, logits, trial

pytestmark = [*MARKS, pytest.mark.skipif(not llama_cpp.LIBRARY.exists(), reason=llama_cpp.ABSENT)]

QUESTION = "Tell me a story about the sea."
NEW = 24


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Trial:
    return trial(tmp_path_factory.mktemp("smollm2"))


def chat(smol: Trial) -> list[int]:
    said = [{"role": "user", "content": QUESTION}]
    found = smol.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    return [int(i) for i in found]


def written(model: Any, prompt: list[int]) -> list[int]:
    """The prompt, and what torch writes after it: the likeliest token each time."""
    text = torch.tensor([prompt])
    found = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=NEW, do_sample=False)
    return [int(i) for i in found[0]]


def there(base: Path, tokens: list[int], adapter: Path | None = None) -> Tensor:
    return torch.from_numpy(llama_cpp.logits(base, tokens, adapter))


def assert_writes_the_same(got: Tensor, tokens: list[int], prompt: list[int]) -> None:
    """Each token that torch wrote is the likeliest one there after those before it: both write the same text."""
    assert got.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :]


@pytest.fixture(scope="module")
def plain(smol) -> Path:
    """The base's safetensors as llama.cpp's converter writes them, in float32."""
    return llama_cpp.convert(smol.base, smol.folder.parent / "base.gguf")


def test_on_a_base_in_float32_both_compute_and_write_the_same(smol, plain):
    prompt = chat(smol)
    with disabled(smol.model):
        bare = written(smol.model, prompt)
        wanted = logits(smol.model, bare)
    got = there(plain, bare)
    floor = float((got - wanted).abs().max())
    assert floor < 1e-4 * float(wanted.abs().max())  # sums of up to 1,536 products in another order, 30 layers
    assert_writes_the_same(got, bare, prompt)

    tokens = written(smol.model, prompt)
    assert tokens != bare
    wanted = logits(smol.model, tokens)
    got = there(plain, tokens, smol.converted)
    # As in test_llama_cpp: two products more for each module.
    assert float((got - wanted).abs().max()) <= 16 * floor
    assert_writes_the_same(got, tokens, prompt)


@pytest.mark.parametrize("kind", ["bf16", "Q4_1"])
def test_on_a_rounded_base_the_change_is_as_exact_as_the_base_itself(kind, smol):
    """There llama.cpp rounds the activations too, to bfloat16 or to blocks of 8 bits, and torch does not. What that
    makes of the bare base is the floor; an adapter's change is the difference of two such runs."""
    if kind == "bf16":
        base = llama_cpp.convert(smol.base, smol.folder.parent / "bf16.gguf", kind)
        model = copy.deepcopy(smol.model)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "lora_" not in name:
                parameter.data = parameter.data.bfloat16().float()
    else:
        base, model = smol.packed, smol.model
    tokens = written(smol.model, chat(smol))
    after = logits(model, tokens)
    with disabled(model):
        before = logits(model, tokens)
    bare = there(base, tokens)
    floor, change = float((bare - before).norm()), float((after - before).norm())

    def off(adapter: Path) -> float:
        return float((there(base, tokens, adapter) - bare - (after - before)).norm())

    # Errors of two runs, each of the size of the floor: at most their sum, and twice that for larger activations.
    bound = 4 * floor
    assert bound < 0.5 * change, f"{floor / change:.3f}: nothing is tested"
    assert off(smol.converted) <= bound
    raw = llama_cpp.convert_adapter(smol.folder, smol.base)  # alpha / rank in place of alpha / sqrt(rank)
    assert off(raw) > bound


def test_a_merged_model_computes_and_writes_the_same(smol, plain, tmp_path):
    merge_adapter(smol.folder, smollm2(dtype="float32"), tmp_path / "merged")
    prompt = chat(smol)
    tokens = written(smol.model, prompt)
    wanted = logits(smol.model, tokens)
    got = there(llama_cpp.convert(tmp_path / "merged", tmp_path / "merged.gguf"), tokens)
    with disabled(smol.model):
        floor = float((there(plain, tokens) - logits(smol.model, tokens)).abs().max())
    assert float((got - wanted).abs().max()) <= 16 * floor
    assert_writes_the_same(got, tokens, prompt)
