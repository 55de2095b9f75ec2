"""Parameters that are adapted where they are read: experts of transformers' mixtures, cost, dropout, and PEFT."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from cases import Experts, Recurrent, randomise
from peft import LoraConfig, get_peft_model
from snapshot import assert_same, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.engine import LoRAConfig, adapters, inject, merge, merged, remove
from lightning_lora.engine.layers import pairs, parameters
from lightning_lora.errors import ConfigError, TargetError


def mixtral(experts: str = "eager") -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    config._experts_implementation = experts
    return MixtralForCausalLM(config).eval()


def qwen3(experts: str = "eager") -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = experts
    return Qwen3MoeForCausalLM(config).eval()


def gpt_oss(experts: str = "eager") -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    config._experts_implementation = experts
    return GptOssForCausalLM(config).eval()


FUSED = {"rank": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
every_mixture = pytest.mark.parametrize("build", [mixtral, qwen3, gpt_oss])


@every_mixture
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_the_experts_of_a_mixture_start_equal_train_merge_and_come_back(build: Any, experts: str):
    model, x = build(experts), torch.randint(0, 32, (2, 6))
    before, output = snapshot(model), model(x).logits.detach()
    inject(model, LoRAConfig(**FUSED))
    torch.testing.assert_close(model(x).logits, output)
    randomise(model)
    model.train()(x, labels=x).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        adapted = model.eval()(x).logits
        assert not torch.allclose(adapted, output, atol=1e-2)
        with merged(model):
            torch.testing.assert_close(model(x).logits, adapted)
        baked = copy.deepcopy(model)
        merge(baked)
        torch.testing.assert_close(baked(x).logits, adapted)
    remove(model)
    assert_same(snapshot(model), before)


@every_mixture
def test_the_experts_of_a_mixture_compute_and_learn_as_in_peft(build: Any):
    model, x = build(), torch.randint(0, 32, (2, 6))
    config = LoraConfig(r=2, lora_alpha=16, target_modules=[], target_parameters=FUSED["target_parameters"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), config)
    inject(model, LoRAConfig(**FUSED))
    randomise(model)
    together = {}
    for pair in pairs(model):
        wrapper: Any = theirs.base_model.model.get_submodule(pair.name.rpartition(".")[0])
        while wrapper.parameter_name != pair.parameter:
            wrapper = wrapper.base_layer
        together[pair.name] = (pair.A, wrapper.lora_A["default"].weight), (pair.B, wrapper.lora_B["default"].weight)
    with torch.no_grad():
        for own, other in (factor for factors in together.values() for factor in factors):
            other.copy_(own)
    model(x, labels=x).loss.backward()
    theirs(x, labels=x).loss.backward()
    torch.testing.assert_close(model(x).logits, theirs(x).logits)
    for own, other in (factor for factors in together.values() for factor in factors):
        torch.testing.assert_close(own.grad, other.grad)


def test_all_linear_says_that_it_leaves_out_fused_experts_and_how_to_adapt_them():
    report = inject(mixtral(), LoRAConfig(rank=1))
    assert not any("experts" in m.name for m in report.modules)
    assert "experts.gate_up_proj" in str(report)
    assert "to adapt: name it in target_parameters" in str(report)


def test_a_parameter_is_computed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(Experts())
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["up", "down"]))
    computed = []
    compute = parameters.ParameterLoRA.value_read
    monkeypatch.setattr(
        parameters.ParameterLoRA, "value_read", lambda self, name: computed.append(name) or compute(self, name)
    )
    model(torch.randn(5, 4))
    assert sorted(computed) == ["down", "up"]
    model[0].up + 0, model[0].up + 0  # outside of a forward nothing is kept
    assert computed[2:] == ["up", "up"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_under_activation_checkpointing(reentrant: bool):
    model = nn.Sequential(Experts())
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["up", "down"]))
    randomise(model)
    x = torch.randn(5, 4, requires_grad=True)
    own = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(x).square().sum(), own)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for p, expected in zip(own, plain):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("which", ["dropout", "rank_dropout", "module_dropout"])
def test_dropout_of_a_parameter_keeps_its_mean_and_is_one_draw_for_a_forward(which: str):
    torch.manual_seed(0)
    model = nn.Sequential(Experts())
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["up"], **{which: 0.5}))
    randomise(model)
    layer = model[0]
    mean = torch.stack([layer.up.detach() for _ in range(4000)]).mean(0)
    change = layer.eval().up.detach() - layer._parameters["up"].detach()
    # A mask's mean is known to 1 / sqrt(4000) of its size.
    assert float((mean - layer.up).detach().abs().max()) <= 5 * float(change.abs().max()) / 4000**0.5
    layer.train()
    x = torch.randn(1, 4).repeat(7, 1)
    output = model(x)
    torch.testing.assert_close(output, output[:1].expand(7, -1))
    assert not all(model(x).allclose(output) for _ in range(30))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa"])
def test_each_matrix_of_a_stack_starts_by_itself(init: str):
    model = nn.Sequential(Experts())
    x = torch.randn(5, 4)
    output = model(x)
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["up"], init=init))
    torch.testing.assert_close(model(x), output)
    A = model[0].lora_A_up.detach().view(3, 2, 4)
    assert not A[0].allclose(A[1])
    if init == "pissa":  # arXiv:2404.02948: A spans the top right singular directions of each expert
        for W, factor in zip(model[0]._parameters["up"].detach(), A):
            V = torch.linalg.svd(W).Vh[:2]
            torch.testing.assert_close(factor @ V.T @ V, factor, rtol=1e-3, atol=1e-4)


def test_target_parameters_match_whole_names_and_endings_as_in_peft():
    def named(*entries: str) -> list[str]:
        model = nn.ModuleDict({"a": Experts(), "b": Experts()})
        report = inject(model, LoRAConfig(rank=1, target_modules=[], target_parameters=list(entries)))
        return [m.name for m in report.modules]

    assert named("up") == ["a.up", "b.up"]
    assert named("b.up") == ["b.up"]
    assert named("a.up", "b.down") == ["a.up", "b.down"]
    with pytest.raises(TargetError, match="'p' matches no parameter of ModuleDict"):
        named("up", "p")


def test_patterns_know_a_parameter_by_its_own_name_and_by_its_modules():
    model = nn.ModuleDict({"a": Experts(), "lstm": nn.LSTM(4, 4)})
    config = LoRAConfig(
        rank=2,
        alpha=2,
        target_modules=["lstm"],
        target_parameters=["up", "down"],
        rank_pattern={"weight_ih_l0": 1, "a": 3},
        alpha_pattern={"a.down": 6},
    )
    report = inject(model, config)
    assert {m.name: (m.rank, m.scale) for m in report.modules} == {
        "a.up": (3, pytest.approx(2 / 3)),
        "a.down": (3, 2.0),
        "lstm.weight_ih_l0": (1, 2.0),
        "lstm.weight_hh_l0": (2, 1.0),
    }


def test_parameters_alone_may_be_targets_and_nothing_at_all_may_not():
    assert LoRAConfig(target_modules=None, target_parameters=["up"]).target_modules == []  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing would be adapted"):
        LoRAConfig(target_modules=[])
    with pytest.raises(ConfigError, match="layers_to_transform chooses among target_modules"):
        LoRAConfig(target_modules=[], target_parameters=["up"], layers_to_transform=[0])


def test_other_parameters_of_an_adapted_module_are_read_as_they_are():
    model = nn.Sequential(Recurrent(nn.LSTM(4, 6)))
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["weight_ih_l0"]))
    randomise(model)
    (_, layer), *_ = adapters(model)
    assert layer.weight_hh_l0 is layer._parameters["weight_hh_l0"]
    assert not layer.weight_ih_l0.equal(layer._parameters["weight_ih_l0"])


@torch.no_grad()
def test_a_parameter_adapted_in_half_precision_keeps_its_masters():
    model: Any = nn.Sequential(Experts())
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["up"]))
    model.to(torch.bfloat16)
    x: Tensor = torch.randn(3, 4, dtype=torch.bfloat16)
    assert model[0].lora_A_up.dtype is torch.float32
    assert model[0].up.dtype is torch.bfloat16
    assert model(x).dtype is torch.bfloat16
