"""Rows of embeddings that are trained for new tokens: PEFT's meaning, tied heads, resized tables, and their cost."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from cases import ScaledEmbedding, randomise
from peft import LoraConfig, get_peft_model
from snapshot import assert_same, snapshot
from tiny_transformers import llama, t5
from torch import Tensor, nn

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    base_fingerprint,
    inject,
    load_adapter_state_dict,
    merge,
    merged,
    remove,
)
from lightning_lora.errors import TargetError

TOKENS = [7, 3, 30]
X = torch.tensor([[3, 4, 7, 7, 30, 0], [1, 2, 30, 3, 5, 31]])


def adapted(model: nn.Module, **fields: Any) -> nn.Module:
    config = {"rank": 2, "target_modules": ["q_proj"], "trainable_token_indices": TOKENS, **fields}
    inject(model, LoRAConfig(**config))
    randomise(model)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(model).items():
            if name.endswith("lora_tokens"):
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)))
    return model


def in_peft(model: nn.Module, ours: nn.Module, tokens: Any) -> Any:
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"], trainable_token_indices=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), config)
    own = adapter_state_dict(ours)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                key = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
                p.copy_(own[key.replace("token_adapter.trainable_tokens_delta", "lora_tokens")])
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [TOKENS, {"embed_tokens": TOKENS}])
def test_a_decoder_computes_and_learns_as_in_peft(tied: bool, tokens: Any):
    base = llama(tied=tied).eval()
    model = adapted(copy.deepcopy(base), trainable_token_indices=tokens)
    theirs = in_peft(base, model, tokens)
    torch.testing.assert_close(model(X).logits, theirs(X).logits)
    for net in (model, theirs):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(X, labels=X).loss.backward()
            optimizer.step()
    torch.testing.assert_close(model(X).logits, theirs(X).logits)
    rows = [p for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name]
    torch.testing.assert_close(model.model.embed_tokens.lora_tokens, rows[0])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_equal_merge_save_load_and_come_back(tied: bool):
    model = llama(tied=tied).eval()
    other = copy.deepcopy(model)
    before, output = snapshot(model), model(X).logits.detach()
    report = inject(model, LoRAConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    # Logits of trained rows are a product of their own, which a head may round otherwise.
    torch.testing.assert_close(model(X).logits, output)
    assert tied or model(X).logits.equal(output)
    assert "rows trained: 3 of model.embed_tokens" in str(report)
    assert ("which lm_head shares" in str(report)) == tied
    remove(model)
    assert_same(snapshot(model), before)

    adapted(model)
    inject(other, LoRAConfig(rank=2, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    load_adapter_state_dict(other, adapter_state_dict(model))
    with torch.no_grad():
        output = model(X).logits
        assert other(X).logits.equal(output)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.load(file, weights_only=False)(X).logits.equal(output)
        adapted_before = snapshot(model)
        with merged(model):
            torch.testing.assert_close(model(X).logits, output)
        assert_same(snapshot(model), adapted_before)
        merge(other)
        torch.testing.assert_close(other(X).logits, output)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    remove(model)
    assert_same(snapshot(model), before)


def test_rows_of_a_head_alone_compute_as_in_peft():
    base = llama(tied=False).eval()
    tokens = {"lm_head": TOKENS}
    model = adapted(copy.deepcopy(base), trainable_token_indices=tokens)
    theirs = in_peft(base, model, tokens)
    torch.testing.assert_close(model(X).logits, theirs(X).logits)
    assert not model(X).logits.allclose(base(X).logits)


def test_only_the_given_rows_are_looked_up_and_get_gradients():
    model: Any = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 2))
    inject(model, LoRAConfig(target_modules=[], trainable_token_indices=[999, 5]))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = model(torch.tensor([[1, 5, 2, 5]])).sum()
    assert max(saved) < 1000  # no copy of the table
    loss.backward()
    row = model[0].lora_tokens.grad
    assert bool(row[1].any())
    assert not bool(row[0].any())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_tokens"]


@torch.no_grad()
def test_a_scaled_embedding_scales_its_trained_rows():
    model: Any = nn.Sequential(ScaledEmbedding())
    inject(model, LoRAConfig(target_modules=[], trainable_token_indices=[2]))
    model[0].lora_tokens.fill_(1.0)
    assert model(torch.tensor([2, 3]))[0].eq(2.5).all()


def test_shared_embeddings_of_an_encoder_and_a_decoder_have_the_same_rows():
    model: Any = t5()
    report = inject(model, LoRAConfig(rank=2, target_modules=["q"], trainable_token_indices=[4, 5]))
    assert set(report.tokens) >= {"shared", "encoder.embed_tokens", "decoder.embed_tokens"} or "shared" in report.tokens
    assert sum(name.endswith("lora_tokens") for name in adapter_state_dict(model)) == 1
    with torch.no_grad():
        before = model(input_ids=X % 8, decoder_input_ids=X % 8).logits
        adapter_state_dict(model)["shared.lora_tokens"].add_(1)
        assert not model(input_ids=X % 8, decoder_input_ids=X % 8).logits.allclose(before)


def test_a_resized_embedding_may_be_filled_with_anything_where_its_rows_are_trained():
    def resized(seed: int) -> Any:
        torch.manual_seed(0)
        model: Any = llama(tied=True).eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(34, mean_resizing=False)
        return model

    first, second = resized(1), resized(2)
    assert base_fingerprint(first) != base_fingerprint(second)
    for model in (first, second):
        adapted(model, trainable_token_indices=[32, 33])
    assert base_fingerprint(first) == base_fingerprint(second)
    load_adapter_state_dict(second, adapter_state_dict(first))
    x = torch.tensor([[32, 1, 33]])
    assert first(x).logits.equal(second(x).logits)


@torch.no_grad()
def test_a_base_checkpoint_that_is_loaded_after_injection_gives_fresh_rows_its_own():
    model: Any = nn.Sequential(nn.Embedding(9, 4))
    inject(model, LoRAConfig(target_modules=[], trainable_token_indices=[8, 1]))
    W = torch.randn(9, 4)
    model.load_state_dict({"0.weight": W})
    assert model(torch.arange(9)).equal(W)


@torch.no_grad()
def test_indices_of_any_integer_type_and_shape_are_looked_up_compiled_or_not():
    model: Any = nn.Sequential(nn.Embedding(9, 4))
    inject(model, LoRAConfig(target_modules=[], trainable_token_indices=[8, 1]))
    model[0].lora_tokens.normal_()
    x = torch.randint(0, 9, (2, 3, 4))
    with merged(copy.deepcopy(model)):
        pass
    expected = model[0]._parameters["weight"].index_copy(0, torch.tensor([8, 1]), model[0].lora_tokens)[x]
    assert model(x).equal(expected)
    assert model(x.int()).equal(expected)
    assert torch.compile(model, fullgraph=True, backend="eager")(x).equal(expected)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x) + self.tags(x % 5))


def test_each_of_several_embeddings_has_rows_of_its_own():
    model = Two()
    report = inject(model, LoRAConfig(target_modules=[], trainable_token_indices={"words": [1], "tags": [2, 3]}))
    assert report.tokens == {"words": 1, "tags": 2, "head": 1}
    assert {name: tuple(t.shape) for name, t in adapter_state_dict(model).items()} == {
        "words.lora_tokens": (1, 4),
        "tags.lora_tokens": (2, 4),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [1]}, "does not say which of its embeddings .* are: words, tags"),
        ({"trainable_token_indices": {"wrods": [1]}}, "Did you mean 'words'"),
        ({"trainable_token_indices": {"words": [9]}}, "has 9 rows, and no row 9: resize"),
        ({"trainable_token_indices": {"words": [1], "head": [2]}}, "other tokens"),
        ({"trainable_token_indices": {"words": [1]}, "target_modules": ["words"]}, "'words' is a target"),
        ({"trainable_token_indices": {"words": [1]}, "target_modules": ["head"]}, "'head' is a target"),
        ({"trainable_token_indices": {"tags": [1]}, "modules_to_save": ["tags"]}, "trained whole"),
    ],
)
def test_what_has_no_meaning_is_refused_and_nothing_changed(fields: dict[str, Any], message: str):
    model = Two()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        inject(model, LoRAConfig(**{"rank": 1, "target_modules": [], **fields}))
    assert_same(snapshot(model), before)
