"""Models on the meta device: adapted without memory, materialised once, and started then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapter_tensors,
    inject,
    load_adapter_state_dict,
    merge,
    remove,
    start_adapters,
)
from lightning_lora.errors import AdapterStateError

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "bias": {"lora_bias": True, "bias": "all"},
    "tokens": {"trainable_token_indices": {"0": [4, 1]}},
    "parameters": {"target_modules": ["2"], "target_parameters": ["1.weight"]},
    "head": {"modules_to_save": ["3"], "target_modules": ["1", "2"]},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3))


def config(variant: str) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "target_modules": ["1", "2"], **VARIANTS[variant]})


def on_meta(build: Callable[[], nn.Module], config: LoRAConfig) -> nn.Module:
    with torch.device("meta"):
        model = build()
    inject(model, config)
    return model


def assigned(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights, assign=True)


def emptied(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(weights)


every_way = pytest.mark.parametrize("materialise", [assigned, emptied])


class Allocations(TorchDispatchMode):
    """Counts the elements of what is made outside of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not made.is_meta and func.namespace == "aten" and "empty" in func.name():
            self.elements += made.numel()
        return made


@every_variant
@every_way
def test_it_starts_as_one_that_was_there_from_the_start(materialise: Any, variant: str):
    base = net()
    there = copy.deepcopy(base)
    torch.manual_seed(3)
    inject(there, config(variant))
    model = on_meta(net, config(variant))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    materialise(model, base.state_dict())
    torch.manual_seed(3)
    start_adapters(model)
    x = torch.tensor([[1, 4, 7]])
    assert model(x).equal(base(x))
    expected = adapter_tensors(there)
    for name, tensor in adapter_tensors(model).items():
        assert tensor.equal(expected[name]), name
        assert tensor.requires_grad == expected[name].requires_grad, name
    model(x).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    assert not model(x).equal(base(x))
    remove(model)
    assert model(x).equal(base(x))


@every_way
def test_what_was_saved_is_loaded_once_it_is_there(materialise: Any):
    base, model = net(), on_meta(net, config("dora"))
    trained = copy.deepcopy(base)
    inject(trained, config("dora"))
    with torch.no_grad():
        for tensor in adapter_tensors(trained).values():
            tensor.add_(torch.randn(tensor.shape))
    with pytest.raises(AdapterStateError, match=r"on the meta device.*to_empty"):
        load_adapter_state_dict(model, adapter_state_dict(trained))
    materialise(model, base.state_dict())
    start_adapters(model)
    load_adapter_state_dict(model, adapter_state_dict(trained))
    x = torch.tensor([[1, 4, 7]])
    assert model(x).equal(trained(x))
    start_adapters(model)  # nothing waits any more
    assert model(x).equal(trained(x))
    merge(model)


def test_a_checkpoint_with_adapters_in_it_is_assigned_whole():
    trained = net()
    inject(trained, config("plain"))
    with torch.no_grad():
        trained[1].lora_B.normal_()
    model = on_meta(net, config("plain"))
    assigned(model, trained.state_dict())
    start_adapters(model)
    x = torch.tensor([[1, 4, 7]])
    assert model(x).equal(trained(x))
    assert model[1].lora_B.equal(trained[1].lora_B)


def test_starting_before_the_weights_are_there_is_an_error_that_names_them():
    model = on_meta(net, config("plain"))
    with pytest.raises(AdapterStateError, match=r"0\.weight.* still on the meta device"):
        start_adapters(model)


def test_nothing_is_allocated_to_adapt_and_every_weight_once():
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    weights = LlamaForCausalLM(llama).state_dict()
    with Allocations() as allocated, torch.device("meta"):
        model = LlamaForCausalLM(llama)
        report = inject(model, LoRAConfig(rank=2))
    # Rotary frequencies, which transformers computes on the CPU.
    assert allocated.elements < 200
    for module in model.modules():  # they are no part of a checkpoint
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape)
    assigned(model, weights)
    start_adapters(model)
    own = dict(model.named_parameters())
    assert all(own[name].data_ptr() == t.data_ptr() for name, t in weights.items()), "the checkpoint's own memory"
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
