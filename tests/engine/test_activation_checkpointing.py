"""Activations that are computed again in the backward pass: by transformers and by torch, reentrant or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, build, output

from lightning_lora.engine import LoRAConfig, adapter_tensors, inject

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "dropouts": {"dropout": 0.25, "rank_dropout": 0.25},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
reentrant_or_not = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])


def gradients(model: nn.Module, inputs: dict[str, Tensor], loss: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)
    loss(model, inputs).backward()
    found = {name: t.grad for name, t in adapter_tensors(model).items() if t.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in found.values()), "every adapter has a gradient"
    return found


def moved(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Adapted, with updates that are not zero, in training mode."""
    torch.manual_seed(3)
    inject(model, config)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.train()


@every_variant
@reentrant_or_not
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral", "vit", "whisper"])
def test_gradients_are_those_without_it_in_transformers(name: str, use_reentrant: bool, variant: str):
    kind = ZOO[name]
    fields = {"target_parameters": list(kind.parameters)} if kind.parameters else {}
    model = moved(build(kind), LoRAConfig(rank=2, **fields, **VARIANTS[variant]))
    again: Any = copy.deepcopy(model)
    again.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        # A reentrant checkpoint asks for an input that requires grad, and the embeddings are frozen.
        again.enable_input_require_grads()
    inputs = kind.inputs()
    expected = gradients(model, inputs, lambda m, x: m(**x).loss)
    found = gradients(again, inputs, lambda m, x: m(**x).loss)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], msg=lambda text, key=key: f"{key}: {text}")


class Stack(nn.Module):
    """Blocks that are checkpointed by torch, if at all."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@every_variant
@reentrant_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16-autocast"])
def test_gradients_are_those_without_it_in_torch(use_reentrant: bool, variant: str, dtype: torch.dtype):
    config = LoRAConfig(rank=2, **VARIANTS[variant])
    plain = moved(Stack(None), config)
    again: Any = copy.deepcopy(plain)
    again.use_reentrant = use_reentrant
    inputs = {"x": torch.randn(5, 6)}

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return output(model, inputs).square().mean()

    expected, found = gradients(plain, inputs, loss), gradients(again, inputs, loss)
    for key, gradient in found.items():
        assert gradient.equal(expected[key]), key
