"""The real PEFT agrees: outputs, gradients, training step by step, and which modules a config means."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import PEFT_CASES, Case
from peft import LoraConfig, TaskType, get_peft_model
from tiny_transformers import bert, gpt2, llama, t5
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapters, inject
from lightning_lora.engine.layers.embedding import EmbeddingLoRA, TokenRows

every_peft_case = pytest.mark.parametrize("case", PEFT_CASES, ids=lambda case: case.name)


def peft_config(config: LoRAConfig, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        trainable_token_indices=config.trainable_token_indices,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        modules_to_save=config.modules_to_save,
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        **more,
    )


def in_peft(base: nn.Module, config: LoRAConfig, **more: Any) -> Any:
    with warnings.catch_warnings():
        # PEFT's own: Conv1D's fan_in_fan_out, and tied weights.
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(base), peft_config(config, **more))


def pairs(model: nn.Module, peft_model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Our trainable tensors beside PEFT's."""
    theirs = dict(peft_model.base_model.model.named_modules())
    together: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in adapters(model):
        if isinstance(module, TokenRows):
            rows = theirs[name].token_adapter.trainable_tokens_delta["default"]
            together[f"{name}.tokens"] = module.lora_tokens, rows
            continue
        if module.lora.parameters:
            for pair in module.lora_pairs(name):
                wrapper: Any = theirs[name]
                while getattr(wrapper, "parameter_name", pair.parameter) != pair.parameter:
                    wrapper = wrapper.base_layer
                together[f"{pair.name}.A"] = pair.A, wrapper.lora_A["default"].weight
                together[f"{pair.name}.B"] = pair.B, wrapper.lora_B["default"].weight
            continue
        wrapped = theirs.get(name) or theirs[name.replace(".out_proj", ".base_layer.out_proj")]
        for factor in "AB":
            if isinstance(module, EmbeddingLoRA):
                other = getattr(wrapped, f"lora_embedding_{factor}")["default"]
            else:
                other = getattr(wrapped, f"lora_{factor}")["default"].weight
            together[f"{name}.lora_{factor}"] = getattr(module, f"lora_{factor}"), other
        if (magnitude := module._parameters.get("lora_magnitude_vector")) is not None:
            together[f"{name}.magnitude"] = magnitude, wrapped.lora_magnitude_vector["default"].weight
        if (bias := module._parameters.get("lora_B_bias")) is not None:
            together[f"{name}.bias"] = bias, wrapped.lora_B["default"].bias
    known = {id(ours) for ours, _ in together.values()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in known:
            path, _, last = name.rpartition(".")
            module = theirs[path]
            module = getattr(module, "modules_to_save", {"default": getattr(module, "base_layer", module)})["default"]
            together[name] = p, getattr(module, last)
    return together


def both(case: Case) -> tuple[nn.Module, Any, dict[str, tuple[Tensor, Tensor]]]:
    model = case.model()
    peft_model = in_peft(model, case.lora_config())
    inject(model, case.lora_config())
    together = pairs(model, peft_model)
    assert {id(p) for p in peft_model.parameters() if p.requires_grad} == {id(other) for _, other in together.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(own) for own, _ in together.values()}
    with torch.no_grad():
        for ours, other in together.values():
            other.copy_(ours.view_as(other))  # PEFT shapes the magnitudes of a convolution as its output
    return model, peft_model, together


@every_peft_case
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_ten_steps_of_training_lose_the_same_as_in_peft(case: Case, kind: Any):
    model, peft_model, together = both(case)
    model.double(), peft_model.double()  # where no rounding makes a difference, only another formula
    x = case.input(torch.float64)
    target = torch.rand_like(model(x))

    def train(net: nn.Module, parameters: list[Tensor]) -> list[float]:
        # A step large enough that ten of them show a wrong scale.
        optimizer = kind(parameters, lr=0.05)
        losses = []
        for _ in range(10):
            loss = nn.functional.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours = train(model, [own for own, _ in together.values()])
    theirs = train(peft_model, [other for _, other in together.values()])
    assert ours == pytest.approx(theirs)
    assert ours[-1] < ours[0]


@every_peft_case
def test_outputs_and_gradients_are_those_of_peft(case: Case):
    model, peft_model, together = both(case)
    with torch.no_grad():
        for ours, other in together.values():
            ours.copy_(torch.randn_like(ours) * 0.3)
            other.copy_(ours.view_as(other))
    model.double(), peft_model.double()
    x = case.input(torch.float64)
    ours, theirs = model(x), peft_model(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, (own, other) in together.items():
        assert own.grad is not None
        torch.testing.assert_close(own.grad.view_as(other), other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_fresh_adapter_is_distributed_as_in_peft(init: str):
    base = nn.Sequential(nn.Linear(400, 300), nn.Embedding(200, 100))
    config = LoRAConfig(rank=16, target_modules=["0", "1"], init=init)
    peft_model = in_peft(base, config, init_lora_weights=True if init == "kaiming" else "gaussian")
    inject(base, config)
    for own, other in pairs(base, peft_model).values():
        own, other = own.detach(), other.detach()
        # 3200 values at least: their standard deviation is known to 2 %.
        assert float(own.std()) == pytest.approx(float(other.std()), rel=0.06)
        assert float(own.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.3)


SELECTIONS = [
    (llama, {"target_modules": "all-linear"}, {}),
    (llama, {"target_modules": ["q_proj", "v_proj"]}, {}),
    (llama, {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}, {}),
    (llama, {"target_modules": r".*\.(q|k)_proj"}, {}),
    (llama, {"target_modules": r"model\.layers\.[02]\.mlp\.\w+_proj"}, {}),
    (llama, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, {}),
    (llama, {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, {}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, {}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, {}),
    (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, {}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}),
    (llama, {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}}, {}),
    (llama, {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 32}}, {}),
    (gpt2, {"target_modules": "all-linear"}, {}),
    (gpt2, {"target_modules": ["c_attn", "wte"]}, {}),
    (bert, {"target_modules": "all-linear"}, {"task_type": TaskType.SEQ_CLS}),
    (bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": "lora_only"}, {}),
    (bert, {"target_modules": ["query"], "bias": "all"}, {}),
    (t5, {"target_modules": "all-linear"}, {}),
    (t5, {"target_modules": ["q", "EncDecAttention.v"]}, {}),
]


@pytest.mark.parametrize(("build", "fields", "more"), SELECTIONS, ids=lambda value: getattr(value, "__name__", None))
def test_a_config_means_the_modules_that_it_means_in_peft(build: Any, fields: dict[str, Any], more: dict[str, Any]):
    model, config = build(), LoRAConfig(**fields)
    theirs = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in in_peft(model, config, **more).base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    report = inject(model, config)
    assert {m.name: (m.rank, m.scale) for m in report.modules} == theirs


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_as_many_parameters_are_trained_as_in_peft(bias: Any):
    model, config = bert(), LoRAConfig(target_modules=["query", "dense"], modules_to_save=["classifier"], bias=bias)
    theirs = in_peft(model, config)
    report = inject(model, config)
    assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
