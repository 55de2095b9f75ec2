"""nn.MultiheadAttention as a target: torch's whole transformers, their fast path, and PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES, SelfAttention, randomise, reference
from torch import nn

from engine.test_peft import both
from lightning_lora.engine import LoRAConfig, adapters, inject, merged


def test_the_input_projections_agree_with_peft_and_the_output_projection_has_its_update_once():
    (case,) = (case for case in CASES if case.name == "attention-packed")
    model, peft_model, together = both(case)
    randomise(model)
    x = case.input()
    with torch.no_grad():
        for name, (own, other) in together.items():
            # PEFT's attention merges out_proj's update into the weight, and then merges out_proj itself as well.
            other.copy_(own / 2 if name.endswith("out_proj.lora_B") else own)
    torch.testing.assert_close(model(x), peft_model(x))
    model(x).square().sum().backward()
    peft_model(x).square().sum().backward()
    for name, (own, other) in together.items():
        if not name.endswith("out_proj.lora_A"):  # of whose two updates there PEFT differentiates one
            torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@torch.no_grad()
def test_nested_tensors_go_through_adapted_layers():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    inject(model, LoRAConfig(rank=2, target_modules=["self_attn", "linear1", "linear2"]))
    randomise(model)
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    exact = reference(model)(x.double(), src_key_padding_mask=mask)
    output = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(output[~mask].double(), exact[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_a_transformer_of_torch_computes_its_formula_with_and_without_the_fast_path(
    norm_first: bool, batch_first: bool
):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    inject(model, LoRAConfig(rank=2, target_modules=["self_attn", "linear1", "linear2"]))
    randomise(model)
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool) if batch_first else torch.zeros(5, 3, dtype=torch.bool)
    mask[0, -2:] = True
    exact = reference(model)(x.double(), src_key_padding_mask=mask)
    kept = ~mask.T if not batch_first else ~mask  # the fast path leaves zeros where the mask is
    kept = kept if batch_first else ~mask.T
    fast = model(x, src_key_padding_mask=mask)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        slow = model(x, src_key_padding_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(fast[kept].double(), exact[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slow[kept].double(), exact[kept], rtol=1e-4, atol=1e-5)


def test_every_adapter_of_a_whole_transformer_learns_in_training_mode():
    model = nn.Transformer(8, 2, 2, 2, 12, batch_first=True, dropout=0.0)
    inject(model, LoRAConfig(rank=2, target_modules=["self_attn", "multihead_attn", "linear1", "linear2"], dropout=0.1))
    randomise(model)
    x, y = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    model(x, y).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        output = model(x, y)
        with merged(model):
            torch.testing.assert_close(model(x, y), output)
        torch.testing.assert_close(reference(model)(x.double(), y.double()).float(), output)


def test_an_attention_brings_its_output_projection_unless_that_is_excluded():
    def named(**fields: Any) -> list[str]:
        return [m.name for m in inject(SelfAttention(), LoRAConfig(rank=2, **fields)).modules]

    assert named(target_modules=["layer"]) == ["layer.in_proj_weight", "layer.out_proj"]
    assert named(target_modules=["layer"], exclude_modules=["out_proj"]) == ["layer.in_proj_weight"]
    assert named(target_modules=r"layer|layer\.out_proj") == ["layer.in_proj_weight", "layer.out_proj"]
    assert named(target_modules=["out_proj"]) == ["layer.out_proj"]


def test_a_pattern_with_the_name_of_an_attention_means_all_its_projections():
    model = SelfAttention(kdim=6, vdim=4)
    config = LoRAConfig(rank=2, target_modules=["layer"], rank_pattern={"v_proj_weight": 1, "layer": 3})
    assert {m.name: m.rank for m in inject(model, config).modules} == {
        "layer.q_proj_weight": 3,
        "layer.k_proj_weight": 3,
        "layer.v_proj_weight": 1,
        "layer.out_proj": 3,
    }


def test_all_linear_says_which_input_projections_it_leaves_out_and_how_to_name_them():
    report = inject(nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12)]), LoRAConfig(rank=1))
    assert [m.name for m in report.modules] == ["0.self_attn.out_proj", "0.linear1", "0.linear2"]
    assert "not adapted: 0.self_attn.in_proj_weight (to adapt: name the nn.MultiheadAttention in" in str(report)


@pytest.mark.parametrize("target", ["layer", "out_proj"])
def test_a_plain_linear_as_output_projection_is_adapted_where_it_is_read(target: str):
    model = SelfAttention().eval()
    model.layer.out_proj = nn.Linear(8, 8)
    inject(model, LoRAConfig(rank=2, target_modules=[target]))
    randomise(model)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x).double(), reference(model)(x.double()), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert model.layer.out_proj.lora_B.grad is not None


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_on_an_output_projection_is_one_draw_for_a_forward(use_dora: bool):
    torch.manual_seed(0)
    model = SelfAttention()
    inject(model, LoRAConfig(rank=2, target_modules=["out_proj"], dropout=0.5, use_dora=use_dora))
    randomise(model)
    x = torch.randn(1, 1, 8).expand(4, 3, 8)
    output = model(x)
    torch.testing.assert_close(output, output[:1, :1].expand(4, 3, 8))
    assert not model(x).allclose(output)
    assert model.eval()(x).equal(model(x))


def test_a_bias_of_b_on_an_output_projection_reaches_the_output():
    model = SelfAttention().eval()
    inject(model, LoRAConfig(rank=2, target_modules=["out_proj"], lora_bias=True))
    x = torch.randn(2, 3, 8)
    before = model(x).detach()
    with torch.no_grad():
        dict(adapters(model))["layer.out_proj"].lora_B_bias.fill_(1.5)
    torch.testing.assert_close(model(x), before + 1.5 * 16 / 2)
    expected = model(x).detach()
    with torch.no_grad(), merged(copy.deepcopy(model)) as _:
        torch.testing.assert_close(model(x), expected)
