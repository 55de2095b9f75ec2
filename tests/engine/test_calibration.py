"""What is measured is what the formulas say, and measuring leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snapshot import assert_same, snapshot
from tiny_transformers import bert
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.engine import LoRAConfig, adapters, inject, start_adapters
from lightning_lora.engine.calibration import calibrate, residuals
from lightning_lora.errors import DataError, TargetError

EVA = LoRAConfig(rank=2, target_modules=["layer"], init="eva")
GA = LoRAConfig(rank=2, target_modules=["layer"], init="lora_ga")


def net(layer: nn.Module, **more: nn.Module) -> Any:
    model = nn.Sequential()
    for name, module in {"layer": layer, **more}.items():
        model.add_module(name, module)
    return model


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["linear", "transformers-conv1d"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_the_second_moment_is_the_mean_over_all_that_a_layer_reads(layer: nn.Module, adapted: bool):
    model = net(layer)
    batches = [torch.randn(3, 5, 6), torch.randn(2, 5, 6)]
    if adapted:
        inject(model, EVA, start=False)
    measured = calibrate(model, EVA, model, batches)
    X = torch.cat([x.reshape(-1, 6) for x in batches])
    torch.testing.assert_close(measured, {"layer": {"C": X.T @ X / len(X)}})


CONVOLUTIONS = {
    "conv1d-stride": (nn.Conv1d(2, 4, 3, stride=2), (2, 2, 9)),
    "conv2d-padding-dilation": (nn.Conv2d(2, 4, 3, padding=(1, 2), dilation=2), (2, 2, 9, 8)),
    "conv2d-same-reflect": (nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect"), (2, 2, 5, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_reads_what_its_kernels_cover(name: str):
    layer, shape = CONVOLUTIONS[name]
    model, x = net(layer), torch.randn(shape)
    C = calibrate(model, EVA, model, [x])["layer"]["C"]
    # The mean of squares of what the layer computes, for any weight, is that of the quadratic form.
    y = (layer(x) - layer.bias.view(-1, *(1,) * (x.dim() - 2))).detach()
    W = layer.weight.detach().flatten(1)
    torch.testing.assert_close((W @ C @ W.T).diagonal(), y.square().transpose(0, 1).flatten(1).mean(1))


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["linear", "transformers-conv1d"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_the_gradient_is_the_mean_of_what_autograd_gives(layer: nn.Module, adapted: bool):
    model = net(layer, dropout=nn.Dropout(0.5))
    batches = [torch.randn(3, 6), torch.randn(2, 6)]
    own = [torch.autograd.grad(layer(x).square().mean(), [layer.weight])[0] for x in batches]
    expected = (own[0] + own[1]) / 2
    if adapted:
        inject(model, GA, start=False)
    measured = calibrate(model, GA, lambda x: model(x).square().mean(), batches)
    torch.testing.assert_close(measured["layer"]["G"], expected.T if isinstance(layer, Conv1D) else expected)


@pytest.mark.parametrize("config", [EVA, GA], ids=["C", "G"])
def test_measuring_leaves_no_trace(config: LoRAConfig):
    model = net(nn.Linear(6, 4), norm=nn.BatchNorm1d(4), dropout=nn.Dropout(0.5), out=nn.Linear(4, 2))
    model.dropout.eval()
    model.out.weight.requires_grad_(False)
    model.layer.weight.grad = torch.ones(4, 6)
    before, random = snapshot(model), torch.get_rng_state()

    def step(x: Tensor) -> Tensor:
        return model(x + torch.randn_like(x)).square().mean()

    calibrate(model, config, step, [torch.randn(3, 6, generator=torch.Generator()) for _ in range(2)])
    assert_same(snapshot(model), before)
    assert torch.get_rng_state().equal(random)
    assert model.layer.weight.grad.equal(torch.ones(4, 6))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "layer.weight")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def fails(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibrate(model, config, fails, [torch.randn(3, 6)])
    assert_same(snapshot(model), before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_encoder_layer_of_torch_calls_its_linears_while_they_are_measured():
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    config = LoRAConfig(rank=2, target_modules=["linear1", "linear2"], init="eva")
    measured = calibrate(model, config, model, [torch.randn(2, 5, 8)])
    assert {name: tuple(of["C"].shape) for name, of in measured.items()} == {"linear1": (8, 8), "linear2": (12, 12)}


@pytest.mark.parametrize("init", ["eva", "corda", "corda_preserving", "lora_ga"])
def test_a_transformers_model_is_measured_and_started(init: str):
    model = bert().eval()
    ids = torch.randint(0, 32, (4, 7))
    config = LoRAConfig(rank=2, init=init)

    def step(x: Tensor) -> Tensor:
        return model(input_ids=x, labels=torch.zeros(4, dtype=torch.long)).loss

    before = model(ids).logits
    inject(model, config, measured=calibrate(model, config, step, [ids, ids.flip(1)]))
    assert model(ids).logits.equal(before)
    assert all(module.lora_A.any() for _, module in adapters(model))


def test_rows_of_an_embedding_that_are_trained_beside_are_not_measured():
    model, ids = bert().eval(), torch.randint(0, 32, (4, 7))
    config = LoRAConfig(rank=2, init="eva", trainable_token_indices={"word_embeddings": [3, 5]})
    bare = calibrate(model, config, model, [ids])
    inject(model, config, start=False)
    torch.testing.assert_close(calibrate(model, config, model, [ids]), bare)
    start_adapters(model, bare)
    assert all(m.lora_A.any() for name, m in adapters(model) if m.lora_pairs(name))


def test_layers_that_no_batch_reaches_are_named():
    model = net(nn.Linear(3, 3), other=net(nn.Linear(3, 3)))
    for config in (EVA, GA):
        with pytest.raises(TargetError, match=r"No batch reached other\.layer.*exclude_modules"):
            calibrate(model, config, lambda x: model.layer(x).sum(), [torch.randn(2, 3)])


@pytest.mark.parametrize("config", [EVA, GA], ids=["C", "G"])
def test_data_that_are_missing_or_not_finite_are_said_to_be(config: LoRAConfig):
    model = net(nn.Linear(3, 3))
    with pytest.raises(DataError, match="no batch to measure on"):
        calibrate(model, config, lambda x: model(x).sum(), [])
    with pytest.raises(DataError, match="at layer is not finite"):
        calibrate(model, config, lambda x: model(x).square().sum(), [torch.full((2, 3), torch.inf)])
    if config is GA:
        with pytest.raises(DataError, match="No batch gave a loss"):
            calibrate(model, config, lambda x: None, [torch.randn(2, 3)])


def test_inputs_of_other_kinds_of_layers_cannot_be_measured():
    model = net(nn.Embedding(5, 3))
    with pytest.raises(TargetError, match="inputs of layer cannot be measured"):
        calibrate(model, EVA, model, [torch.zeros(2, dtype=torch.long)])


def test_an_initialiser_that_draws_measures_nothing():
    model = net(nn.Linear(3, 3))
    assert calibrate(model, LoRAConfig(target_modules=["layer"]), model, []) == {}


def test_what_quantization_took_is_asked_of_quantized_weights_alone():
    model = net(nn.Linear(3, 3))
    config = LoRAConfig(rank=2, target_modules=["layer"], init="loftq")
    with pytest.raises(TargetError, match="layer is not quantized"):
        residuals(model, config, lambda name: torch.zeros(3, 3))
