"""Bits per byte, against sums by hand and transformers' own loss."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import tiny_transformers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from lightning_lora import LoRAConfig, disabled, inject
from lightning_lora.analysis.bits_per_byte import ScoredTexts, context_of
from lightning_lora.embedded import BASE, GENERAL, general_texts
from lightning_lora.errors import ConfigError
from tests.hub.models import shake

TEXTS = ["Whales.", "é is two bytes, and — three."]


class Bytes(nn.Module):
    """A causal model of bytes: each token is predicted from the mean of those before it."""

    def __init__(self, words: int = 260) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(words, 8), nn.Linear(8, words)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class Tokens:
    """One token for each character, the same for all beyond 250; without a BOS token."""

    bos_token_id = None

    def __call__(self, text: str, **options: object) -> dict[str, list]:
        assert options["add_special_tokens"] is False
        found: dict[str, list] = {"input_ids": [min(ord(c), 250) for c in text]}
        if options.get("return_offsets_mapping"):
            found["offset_mapping"] = [(i, i + 1) for i in range(len(text))]
        return found


class WithStart(Tokens):
    bos_token_id = 256


class Slow(Tokens):
    def __call__(self, text: str, **options: object) -> dict[str, list]:
        if options.get("return_offsets_mapping"):
            raise NotImplementedError
        return super().__call__(text, **options)


@torch.no_grad()
def bits(model: nn.Module, row: list[int]) -> float:
    """-log2 p of all tokens of a row but the first, one forward for each."""
    total = 0.0
    for at in range(1, len(row)):
        p = F.softmax(model(torch.tensor([row[:at]]))[0, -1].double(), dim=-1)
        total -= math.log2(float(p[row[at]]))
    return total


@pytest.mark.parametrize("length", [1024, 5], ids=["whole", "windows"])
def test_bits_are_those_of_each_token_from_the_ones_before_it_and_bytes_are_those_that_they_stand_for(length):
    model = Bytes().eval()
    rows = [[min(ord(c), 250) for c in text] for text in TEXTS]
    with_start = [[256, *row[i : i + length - 1]] for row in rows for i in range(0, len(row), length - 1)]
    scored = ScoredTexts(model, WithStart(), TEXTS, max_tokens=length)
    whole = sum(len(text.encode()) for text in TEXTS)
    assert scored.bytes == whole == 7 + 31
    # float32 logits: a relative error of 1e-7 in each of about 40 terms.
    assert scored.bits_per_byte() == pytest.approx(sum(bits(model, row) for row in with_start) / whole, rel=1e-5)

    pieces = [text[i : i + length] for text in TEXTS for i in range(0, len(text), length)]
    count = sum(len(piece[1:].encode()) for piece in pieces)
    scored = ScoredTexts(model, Tokens(), TEXTS, max_tokens=length)
    assert scored.bytes == count < whole
    total = sum(bits(model, [min(ord(c), 250) for c in piece]) for piece in pieces)
    assert scored.bits_per_byte() == pytest.approx(total / count, rel=1e-5)


def test_it_is_transformers_own_loss_with_the_adapter_and_without():
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = tiny_transformers.llama(words=259)
    inject(model, LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    shake(model)
    text = "A boy, a boat."
    scored = ScoredTexts(nn.ModuleDict({"model": model}), tokenizer, [text])
    ids = torch.tensor([[tokenizer.bos_token_id, *text.encode()]])
    found = []
    for used in (nullcontext(), disabled(model)):
        with torch.no_grad(), used:
            found.append(float(model.eval()(input_ids=ids, labels=ids).loss) / math.log(2))
            assert scored.bits_per_byte() == pytest.approx(found[-1], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-4)
    assert context_of(model.config) == model.config.max_position_embeddings


class SeesAll(Bytes):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x.mean(1, keepdim=True) + 0 * x)


class GivesNone(Bytes):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)[:, 0]


class AsksForMore(Bytes):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return super().forward(input_ids)


def test_what_cannot_be_scored_is_an_error_that_says_why():
    for model, tokenizer, message in [
        (SeesAll(), WithStart(), "SeesAll sees the tokens after a place"),
        (GivesNone(), WithStart(), "GivesNone gives no logits"),
        (Bytes(100), WithStart(), "Bytes fails on the tokens"),
        (AsksForMore(), WithStart(), "AsksForMore fails on the tokens as its input_ids alone"),
        (tiny_transformers.bert(), WithStart(), "causal language model"),
        (nn.Linear(2, 2), WithStart(), "no part of Linear has a forward with `input_ids`"),
        (Bytes(), None, "needs a tokenizer, and Bytes has none"),
        (Bytes(), Slow(), "does not say where its tokens end"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ScoredTexts(model, tokenizer, TEXTS)
    with pytest.raises(ConfigError, match="no token that a model could predict"):
        ScoredTexts(Bytes(), WithStart(), ["", ""])
    unknown = WithStart()
    unknown.unk_token_id = 250
    with pytest.raises(ConfigError, match="no token for some characters"):
        ScoredTexts(Bytes(), unknown, TEXTS)
    # The part that fits is found inside of one that does not.
    inner = AsksForMore()
    inner.own = Bytes()
    assert type(ScoredTexts(inner, WithStart(), TEXTS).network) is Bytes


def test_modes_are_put_back_and_dropout_is_off():
    model = nn.ModuleDict({"net": Bytes(), "other": nn.Dropout()})
    model["net"].embed.eval()
    scored = ScoredTexts(model, WithStart(), TEXTS)
    modes = [module.training for module in model.modules()]
    scored.bits_per_byte()
    assert [module.training for module in model.modules()] == modes


def test_the_text_that_ships_is_a_few_passages_of_old_works():
    rows = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == list(general_texts())
    assert all(row["text"].isascii() and len(row["text"]) > 500 for row in rows)
    assert all(row["year"] < 1900 and row["author"] and row["work"] for row in rows)
    assert all(row["source"].startswith("GITenberg/") for row in rows)
    assert 4_000 < sum(len(text) for text in general_texts()) < 8_000
