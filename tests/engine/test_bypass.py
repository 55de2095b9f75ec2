"""Parents that read a child's weight without calling it: the adapted weight is what they read, or they are refused."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from cases import randomise, reference
from snapshot import assert_same, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_lora.engine import LoRAConfig, inject, merge, merged, remove
from lightning_lora.errors import AdapterStateError, TargetError


def encoder(layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval()


def padding() -> Tensor:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


def exact_output(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The formula's output, on the slow path."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return reference(model)(x.double(), src_key_padding_mask=mask).detach()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["out_proj"], "all-linear"], ids=str)
def test_the_fast_path_of_the_transformer_encoder_uses_the_adapted_weights(targets, grad: bool, padded: bool):
    model, x, mask = encoder(), torch.randn(2, 5, 8), padding() if padded else None
    inject(model, LoRAConfig(rank=2, target_modules=targets))
    randomise(model)
    valid = slice(None) if mask is None else ~mask  # what lies in the padding is no output
    with torch.set_grad_enabled(grad):
        output = model(x, src_key_padding_mask=mask)
    exact = exact_output(model, x, mask)
    torch.testing.assert_close(output[valid].double(), exact[valid], rtol=1e-4, atol=1e-5)
    if grad:
        output.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), merged(model):
        merged_output = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(merged_output[valid].double(), exact[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fast_path_works_where_only_a_later_layer_is_adapted():
    model, x, mask = encoder(), torch.randn(2, 5, 8), padding()
    inject(model, LoRAConfig(rank=2, target_modules=["linear1"], layers_to_transform=[1]))
    randomise(model)
    with torch.no_grad():
        output = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(output[~mask].double(), exact_output(model, x, mask)[~mask], rtol=1e-4, atol=1e-5)


def test_every_adapter_of_an_attention_gets_a_gradient_in_training():
    model = encoder().train()
    inject(model)
    model(torch.randn(2, 5, 8)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_linear_that_its_parent_reads_and_that_computes_otherwise_is_adapted_by_its_weight():
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = encoder(1), torch.randn(2, 5, 8)
    model.layers[0].linear1 = Odd(8, 12)
    inject(model, LoRAConfig(rank=2, target_modules=["linear1"]))
    randomise(model)
    torch.testing.assert_close(model(x).double(), exact_output(model, x, None), rtol=1e-4, atol=1e-5)


def test_accelerates_hooks_are_refused_before_anything_is_changed():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_hook_to_module(model[1], ModelHook())
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'1' .*a forward of its own.*accelerate"):
        inject(model, LoRAConfig(rank=2, target_modules=["0", "1"]))
    assert_same(snapshot(model), before)
    remove_hook_from_module(model, recurse=True)
    assert len(inject(model, LoRAConfig(rank=2, target_modules=["0", "1"])).modules) == 2


def test_hooks_of_accelerate_that_came_later_see_the_adapter_and_are_refused_when_it_is_to_go():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    base = model(x)
    inject(model, LoRAConfig(rank=2))
    randomise(model)
    output = model(x)
    add_hook_to_module(model[0], ModelHook())
    assert model(x).equal(output)
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match="'0' was given a forward"):
        remove(model)
    with pytest.raises(AdapterStateError, match="'0' was given a forward"), merged(model):
        pass
    assert_same(snapshot(model), before)
    remove_hook_from_module(model, recurse=True)
    with merged(model):
        torch.testing.assert_close(model(x), output)
    assert model(x).equal(output)
    remove(model)
    assert model(x).equal(base)


def test_an_attribute_that_an_adapter_would_overwrite_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].lora_A = nn.Parameter(torch.zeros(1))
    with pytest.raises(TargetError, match="already has an attribute 'lora_A'"):
        inject(model, LoRAConfig(rank=2))


def test_a_weight_normed_layer_is_adapted_and_removed_but_not_merged():
    model = nn.Sequential(OrderedDict(a=parametrizations.weight_norm(nn.Linear(4, 4)), out=nn.Linear(4, 2))).eval()
    before, x = snapshot(model), torch.randn(3, 4)
    output = model(x)
    inject(model, LoRAConfig(rank=2))
    assert model(x).equal(output)
    randomise(model)
    W, A, B = model.a.parametrizations.weight(), model.a.lora_A, model.a.lora_B
    torch.testing.assert_close(model.a.weight, W + model.a.lora.scale * B @ A)
    expected = model.out(nn.functional.linear(x, W + model.a.lora.scale * B @ A, model.a.bias))
    torch.testing.assert_close(model(x), expected)
    adapted = snapshot(model)
    with pytest.raises(AdapterStateError, match=r"'a'.*cannot be merged.*computed"):
        merge(model)
    assert_same(snapshot(model), adapted)
    remove(model)
    assert_same(snapshot(model), before)


def test_a_layer_that_was_parametrized_after_injection_is_refused_before_anything_is_changed():
    model, name = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "bias"
    inject(model, LoRAConfig(rank=2, target_modules=["0", "1"]))
    parametrize.register_parametrization(model[1], name, nn.Identity())
    before = snapshot(model)
    for undo in (remove, merge):
        with pytest.raises(AdapterStateError, match="'1' changed its class"):
            undo(model)
        assert_same(snapshot(model), before)
    parametrize.remove_parametrizations(model[1], name)
    remove(model)
    assert type(model[1]) is nn.Linear
