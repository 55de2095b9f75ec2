"""What the benchmarks train: small models of the usual architectures, with random weights and one random batch."""

from __future__ import annotations

import functools

import torch
from contenders import Workload
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUERY_VALUE = ("q_proj", "v_proj")


def decoder(
    *, hidden: int = 768, layers: int = 4, rows: int = 4, tokens: int = 128, targets: tuple[str, ...] = ALL_LINEAR
) -> Workload:
    """A Llama-like language model, with a small vocabulary, so that its head does not hide the rest."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=1024,
        use_cache=False,
    )
    tokens_ = torch.randint(0, 1024, (rows, tokens), generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module) -> Tensor:
        embedded = model.get_input_embeddings()(tokens_).detach().requires_grad_()
        return model(inputs_embeds=embedded, labels=tokens_).loss

    name = f"Llama-like decoder: hidden {hidden}, {layers} layers, {rows} x {tokens} tokens"
    return Workload(name, functools.partial(LlamaForCausalLM, config), loss, targets)


def encoder(*, hidden: int = 384, layers: int = 6, rows: int = 32, tokens: int = 48) -> Workload:
    """A BERT-like classifier of MiniLM's size."""
    config = BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        vocab_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    generator = torch.Generator().manual_seed(1)
    tokens_ = torch.randint(0, 1024, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)

    def loss(model: nn.Module) -> Tensor:
        embedded = model.get_input_embeddings()(tokens_).detach().requires_grad_()
        return model(inputs_embeds=embedded, labels=labels).loss

    name = f"BERT-like encoder: hidden {hidden}, {layers} layers, {rows} x {tokens} tokens"
    return Workload(
        name, functools.partial(BertForSequenceClassification, config), loss, ("query", "key", "value", "dense")
    )


class Convolutions(nn.Module):
    """Four stages of 3 x 3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, 4 * channels, 8 * channels]
        for i in range(4):
            self.add_module(f"stem{i}", nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1))
            self.add_module(f"conv{i}", nn.Conv2d(widths[i + 1], widths[i + 1], 3, padding=1))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = F.relu(self.get_submodule(f"stem{i}")(x))
            x = x + F.relu(self.get_submodule(f"conv{i}")(x))
        return self.head(x.mean((2, 3)))


def convolutional(*, channels: int = 32, rows: int = 8, size: int = 64) -> Workload:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 3, size, size, generator=generator)
    labels = torch.randint(0, 10, (rows,), generator=generator)

    def loss(model: nn.Module) -> Tensor:
        x = images.to(next(model.parameters()).dtype).requires_grad_()
        return F.cross_entropy(model(x).float(), labels)

    name = f"Convolutional: {channels} to {8 * channels} channels, {rows} images of {size} x {size}"
    return Workload(
        name, functools.partial(Convolutions, channels), loss, tuple(f"conv{i}" for i in range(4)), linear=False
    )
