"""Activated LoRA against PEFT's, and what it promises: before the invocation, all is the base's own, bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from snapshot import assert_same, snapshot
from tiny_transformers import gpt2, llama
from torch import Tensor, nn

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapters,
    inject,
    load_adapter_state_dict,
    merge,
    merged,
    remove,
)
from lightning_lora.errors import AdapterStateError, ConfigError, TargetError

# PEFT's, and that of the name by which gradient checkpointing is still known.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
TOKENS = [5, 6]
CONFIG = LoRAConfig(rank=2, alpha=8, alora_invocation_tokens=TOKENS)
PAD = 0
# Invoked late, early, twice (the last counts), by what only looks alike, not at all, and by the last two tokens.
ROWS = [
    [9, 8, 7, 5, 6, 1, 2],
    [5, 6, 9, 8, 7, 1, 2],
    [5, 6, 9, 5, 6, 1, 2],
    [5, 9, 6, 5, 5, 1, 2],
    [9, 8, 7, 4, 3, 1, 2],
    [9, 8, 7, 4, 3, 5, 6],
]
STARTS: list[int | None] = [3, 0, 3, None, None, 5]


def adapted(build: Any = llama, config: LoRAConfig = CONFIG) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # random weights of the usual size leave the logits all but equal
                p.normal_(std=0.3)
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def base_of(model: nn.Module) -> Any:
    bare = copy.deepcopy(model)
    remove(bare)
    return bare


def in_peft(model: nn.Module, config: LoRAConfig = CONFIG) -> Any:
    """The same adapter in PEFT."""
    theirs: Any = get_peft_model(
        base_of(model),
        LoraConfig(
            r=config.rank,
            lora_alpha=int(config.alpha),
            target_modules=[name for name, _ in adapters(model)],
            task_type="CAUSAL_LM",
            alora_invocation_tokens=config.alora_invocation_tokens,
        ),
    ).eval()
    theirs.to(next(model.parameters()).dtype)
    for name, module in adapters(model):
        layer = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(module.lora_A)
            layer.lora_B["default"].weight.copy_(module.lora_B)
    return theirs


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The rows with pads on one side."""
    width = len(ROWS[0]) + len(ROWS)
    ids, mask = torch.full((len(ROWS), width), PAD), torch.zeros(len(ROWS), width, dtype=torch.long)
    for i, row in enumerate(ROWS):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_outputs_and_gradients_are_those_of_peft(side: str):
    model = adapted().double()
    theirs = in_peft(model)
    ids, mask = (torch.tensor(ROWS), torch.ones(6, 7, dtype=torch.long)) if side == "none" else padded(side)
    ours, other = model(ids, attention_mask=mask).logits, theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, other)
    ours.square().mean().backward()
    other.square().mean().backward()
    for name, module in adapters(model):
        layer = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(module.lora_A.grad, layer.lora_A["default"].weight.grad)
        torch.testing.assert_close(module.lora_B.grad, layer.lora_B["default"].weight.grad)


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_before_its_invocation_a_row_is_the_bases_own_bit_for_bit(build: Any):
    model = adapted(build)
    ids = torch.tensor(ROWS)
    ours, base = model(ids), base_of(model)(ids)
    for row, start in enumerate(STARTS):
        until = len(ROWS[row]) if start is None else start
        assert ours.logits[row, :until].equal(base.logits[row, :until])
        for mine, theirs in zip(ours.past_key_values.layers, base.past_key_values.layers):
            assert mine.keys[row, :, :until].equal(theirs.keys[row, :, :until])
        if start is not None:
            assert not torch.allclose(ours.logits[row, start:], base.logits[row, start:], atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@torch.no_grad()
def test_generation_goes_on_as_without_a_cache_and_as_in_peft(settings: dict[str, Any]):
    model = adapted()
    ids, mask = padded("left")
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    ours = model.generate(ids, **how, **settings)
    assert not ours.equal(base_of(model).generate(ids, **how, **settings))
    if not settings:
        assert ours.equal(in_peft(model).generate(input_ids=ids, **how))
    if settings != {"num_beams": 3}:
        greedy = ids
        for _ in range(6):
            mask = torch.cat([mask, torch.ones(len(ROWS), 1, dtype=torch.long)], 1) if greedy is not ids else mask
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(greedy, attention_mask=mask, position_ids=position, use_cache=False).logits
            greedy = torch.cat([greedy, logits[:, -1].argmax(-1, keepdim=True)], 1)
        # What is generated does not invoke anew where a cache is used; without one, all is read again.
        same = [row for row in range(len(ROWS)) if not _invokes(ours[row, ids.shape[1] - 1 :].tolist())]
        assert same
        assert ours[same].equal(greedy[same])


def _invokes(row: list[int]) -> bool:
    return any(row[i : i + 2] == TOKENS for i in range(len(row)))


@pytest.mark.parametrize("cut", range(1, 7))
@torch.no_grad()
def test_a_prompt_in_two_parts_is_computed_as_in_one(cut: int):
    model = adapted().double()  # the parts are products of other shapes, and float32 rounds each its own way
    ids = torch.tensor(ROWS)
    whole = model(ids).logits
    first = model(ids[:, :cut], use_cache=True)
    second = model(ids[:, cut:], past_key_values=first.past_key_values).logits
    for row, start in enumerate(STARTS):
        # A sequence across the cut is found when it is complete; a second one does not undo the first; and a single
        # token does not invoke.
        late = start is not None and start < cut < start + 2
        if ids.shape[1] - cut > 1 and not late and row != 2:
            torch.testing.assert_close(second[row], whole[row, cut:])


@torch.no_grad()
def test_the_bases_cache_serves_the_adapter_and_each_cache_remembers_its_rows():
    model, ids = adapted().double(), torch.tensor(ROWS[:1])
    base = base_of(model)
    prompt = base(ids[:, :3], use_cache=True).past_key_values
    ours = model(ids[:, 3:], past_key_values=copy.deepcopy(prompt))
    torch.testing.assert_close(ours.logits, model(ids).logits[:, 3:])
    # Two in turn, one of them a copy; the other was never invoked.
    invoked, idle = copy.deepcopy(ours.past_key_values), model(torch.tensor(ROWS[4:5]), use_cache=True).past_key_values
    token = torch.tensor([[3]])
    here, there = model(token, past_key_values=invoked).logits, model(token, past_key_values=idle).logits
    torch.testing.assert_close(here, model(torch.cat([ids, token], 1)).logits[:, -1:])
    bare = base(torch.cat([torch.tensor(ROWS[4:5]), token], 1)).logits[:, -1:]
    torch.testing.assert_close(there, bare)


@torch.no_grad()
def test_a_bias_of_b_is_added_where_the_adapter_was_invoked_alone():
    model = adapted(config=LoRAConfig(rank=2, alora_invocation_tokens=TOKENS, lora_bias=True))
    ids = torch.tensor(ROWS)
    ours, base = model(ids).logits, base_of(model)(ids).logits
    for row, start in enumerate(STARTS):
        until = len(ROWS[row]) if start is None else start
        assert ours[row, :until].equal(base[row, :until])


@torch.no_grad()
def test_the_inner_model_and_the_last_logits_alone_are_adapted_too():
    model = adapted(config=LoRAConfig(rank=2, target_modules=["q_proj", "lm_head"], alora_invocation_tokens=TOKENS))
    model.double()
    ids = torch.tensor(ROWS)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    model(torch.flip(ids, [1]))
    torch.testing.assert_close(model.lm_head(model.model(ids).last_hidden_state), whole)


def test_remove_takes_the_hooks_along_and_pickles_and_copies_work():
    torch.manual_seed(0)
    model = llama().eval()
    before, ids = snapshot(model), torch.tensor(ROWS)
    inject(model, CONFIG)
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.normal_(std=0.3)
        expected = model(ids).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            assert twin(ids).logits.equal(expected)
            model(torch.flip(ids, [1]))  # each hears its own tokens
            assert twin(ids).logits.equal(expected)
        fresh = llama().eval()
        fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
        inject(fresh, CONFIG)
        load_adapter_state_dict(fresh, adapter_state_dict(model))
        assert fresh(ids).logits.equal(expected)
    remove(model)
    assert_same(snapshot(model), before)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    model(inputs_embeds=model.get_input_embeddings()(ids))


def test_it_cannot_be_merged():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match="acts everywhere"):
        merge(model)
    with pytest.raises(AdapterStateError, match="acts everywhere"), merged(model):
        pass
    assert_same(snapshot(model), before)


def test_without_tokens_it_says_that_it_needs_them():
    model = adapted()
    embedded = model.get_input_embeddings()(torch.tensor(ROWS))
    with pytest.raises(AdapterStateError, match="not with inputs_embeds"):
        model(inputs_embeds=embedded)
    with pytest.raises(AdapterStateError, match="call the whole model"):
        adapted().model.layers[0].self_attn.q_proj(torch.randn(2, 3, 16))
    model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.tensor(ROWS))
    model.model.layers[0]._forward_pre_hooks.clear()
    assert model(torch.tensor(ROWS)).logits.shape == (6, 7, 32)  # a forward that raised leaves nothing behind


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same_and_wants_a_backward_pass_for_each_forward(reentrant: bool):
    model = adapted().train()
    ids = torch.tensor(ROWS)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        return [m.lora_B.grad.clone() for _, m in adapters(model)]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # what the reentrant kind needs where the base is frozen
    for _ in range(2):
        torch.testing.assert_close(gradients(), plain)
    # Others in between, of which one has a backward pass of its own, later.
    model.zero_grad()
    first, second = (model(rows).logits.square().mean() for rows in (ids, ids.flip(1)))
    with torch.no_grad():
        model.eval()(ids[:2, :4])
    model.train()
    first.backward()
    torch.testing.assert_close([m.lora_B.grad for _, m in adapters(model)], plain)
    second.backward()
    outputs = [model(rows).logits for rows in (ids, ids.flip(1))]
    loss = outputs[0].square().mean() + outputs[1].square().mean()
    with pytest.raises(AdapterStateError, match="needs a backward pass for each forward"):
        loss.backward()
    torch.testing.assert_close(gradients(), plain)


REFUSED = [
    ({"use_dora": True}, ConfigError, "use_dora has no meaning with alora_invocation_tokens"),
    ({"bias": "lora_only"}, ConfigError, "bias='lora_only' has no meaning with alora_invocation_tokens.*lora_bias"),
    ({"alora_invocation_tokens": []}, ConfigError, r"such as \[5, 17\], not \[\]"),
    ({"alora_invocation_tokens": [1, -1]}, ConfigError, "ids of one or more tokens"),
    ({"alora_invocation_tokens": "<go>"}, ConfigError, "tokenizer.encode"),
    ({"alora_invocation_tokens": [True]}, ConfigError, "ids of one or more tokens"),
    ({"target_modules": ["embed_tokens"]}, TargetError, "adapts linear layers alone"),
]


@pytest.mark.parametrize(("fields", "error", "message"), REFUSED)
def test_what_has_no_meaning_is_refused(fields: dict[str, Any], error: type[Exception], message: str):
    model = llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, LoRAConfig(**{"rank": 2, "alora_invocation_tokens": TOKENS, **fields}))
    assert_same(snapshot(model), before)


def test_a_model_that_takes_no_tokens_is_refused():
    with pytest.raises(TargetError, match="no module of Sequential takes input_ids"):
        inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), CONFIG)
