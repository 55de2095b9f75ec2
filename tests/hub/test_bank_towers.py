"""Qwen2-VL, whose tower takes the patches of all images, unequally many a row, in one dimension."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.errors import AdapterStateError

IMAGE, BEGIN, END = 60, 61, 62
GRID = torch.tensor([[1, 4, 4], [1, 2, 2], [1, 4, 2]])
"""Frames, height and width of three images, in patches: one of the first row, two of the second."""
ROW_OF_IMAGE = (0, 1, 1)


def model() -> nn.Module:
    torch.manual_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
        video_token_id=63,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def inputs() -> dict[str, Tensor]:
    def prompt(*tokens: int) -> list[int]:
        return [5, *(t for n in tokens for t in (BEGIN, *[IMAGE] * n, END)), 7, 8]

    prompts = [prompt(4), prompt(1, 2)]  # four patches make a token
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    patches = torch.randn(int(GRID.prod(-1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": patches,
        "image_grid_thw": GRID,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def rows_of(patches_a_position: int) -> list[int]:
    return [row for row, image in zip(ROW_OF_IMAGE, GRID.prod(-1).tolist()) for _ in range(image // patches_a_position)]


def test_images_of_unequal_number_and_size_get_the_adapter_of_their_row():
    base, batch = model(), inputs()
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | nn.Conv3d)]
    bank = Bank(base, 2, max_rank=2, target_modules="|".join(map(re.escape, layers)))
    torch.manual_seed(2)
    for name in "ab":
        shapes = {layer: cell.geometry.shapes(cell.module, 2) for layer, cell in bank._cells.items()}
        bank.put(name, {n: LayerFactors(torch.randn(A) / 2, torch.randn(B) / 2, 1.0) for n, (A, B) in shapes.items()})
    alone = {}
    with torch.no_grad():
        for name in "ab":
            with bank.use(name):
                alone[name] = base(**batch).logits
        with bank.use(["a", "b"]), pytest.raises(AdapterStateError, match=r"visual\.patch_embed\.proj.*rows_inside"):
            base(**batch)
        bank.rows_inside(base.model.visual, lambda hidden, grid_thw, **_: rows_of(1))
        with bank.use(["a", "b"]), pytest.raises(AdapterStateError, match=r"'model\.visual\.merger.* 28 positions"):
            base(**batch)
        bank.rows_inside(base.model.visual.merger.mlp, lambda hidden: rows_of(4))
        for names in (["a", "b"], ["b", "a"]):
            with bank.use(names):
                found = base(**batch).logits
            for row, name in enumerate(names):
                seen = batch["attention_mask"][row].bool()
                exact = alone[name][row][seen]
                # float32, through eight layers in another order of summation.
                torch.testing.assert_close(found[row][seen], exact, rtol=1e-3, atol=1e-4)
                other = alone["b" if name == "a" else "a"][row][seen]
                assert (exact - other).abs().max() > 1
