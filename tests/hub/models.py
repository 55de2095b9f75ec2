"""Small models of each kind, and the ways to train and to compare them that the tests of the hub share."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from lightning_lora import adapter_state_dict
from lightning_lora.engine import adapter_tensors


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.block(x))))


class Convolutions(nn.Module):
    """One of each dimension, grouped where PEFT can; each has its own way of being strided and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.two = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.three = nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 4, 16)
        x = self.two(self.one(x)[:, None])  # (N, 4, 2, 8)
        x = self.three(x.reshape(len(x), 2, 2, 2, 8))  # (N, 4, 2, 2, 8)
        return self.head(x.flatten(2).mean(-1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))


class Shared(nn.Module):
    """One block used in two places."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), act=nn.Tanh()))
        self.blocks = nn.ModuleList([block, block])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Experts(nn.Module):
    """A mixture whose experts lie in stacks, as in transformers 5: two parameters of one module, and a router."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 6, 10), (3, 10, 6)) if is_transposed else ((3, 10, 6), (3, 6, 10))
        self.up = nn.Parameter(torch.randn(up) * 0.3)
        self.down = nn.Parameter(torch.randn(down) * 0.3)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # (N, 6), (N, 3) -> (N, 6)
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        h = torch.tanh(torch.einsum("ni,eio->neo", x, up))
        return torch.einsum("neo,eoi,ne->ni", h, down, weights)


class Mixture(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = Experts(is_transposed)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x, self.router(x).softmax(-1)))


class Attention(nn.Module):
    """nn.MultiheadAttention between linear layers; its projections are packed, or not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 2)
        self.width = options.get("kdim", 8)

    def forward(self, x: Tensor) -> Tensor:  # (N, 5, 6) -> (N, 5, 2)
        x = torch.tanh(self.inp(x))
        other = x[..., : self.width]
        return self.head(self.attention(x, other, other, need_weights=False)[0])


class Odd(nn.Module):
    """Layers that PEFT adapts by their parameters, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 6, mode="mean")
        self.cell = nn.GRUCell(6, 6)
        self.pair = nn.Bilinear(6, 6, 4)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.up = nn.ConvTranspose1d(5, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 7) of indices
        y = self.bag(x)
        y = torch.tanh(self.pair(y, self.cell(y)))
        y, _ = self.rnn(y[:, None].expand(-1, 3, -1))
        return self.up(y.mT)


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}
    config = LlamaConfig(**sizes)
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3)).eval()


FLOATS = {
    "linears": (5, 6),
    "convolutions": (3, 4, 16),
    "shared": (5, 6),
    "mixture": (5, 6),
    "mixture-transposed": (5, 6),
    "attention": (3, 5, 6),
    "attention-parts": (3, 5, 6),
}
MAKERS = {
    "linears": Linears,
    "convolutions": Convolutions,
    "words": Words,
    "shared": Shared,
    "mixture": Mixture,
    "mixture-transposed": lambda: Mixture(is_transposed=True),
    "attention": Attention,
    "attention-parts": lambda: Attention(kdim=4, vdim=4),
    "odd": Odd,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "classifier": classifier,
}


def build(kind: str) -> tuple[nn.Module, Tensor]:
    """A model of this kind, always with the same weights, and an input for it."""
    torch.manual_seed(1)
    model = MAKERS[kind]().eval()
    return model, torch.randn(FLOATS[kind]) if kind in FLOATS else torch.randint(1, 20, (2, 7))


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)


def shake(model: nn.Module) -> None:
    """Move all that is trained, as training would."""
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn(tensor.shape))


def peft_folder(model: nn.Module, folder: Path, *, save: dict[str, Any] | None = None, **fields: Any) -> nn.Module:
    """Adapt a copy of `model` with PEFT, move what it trains, save it into `folder`; returns the adapted copy."""
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 2, **fields})).eval()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    adapted.save_pretrained(folder, **(save or {"save_embedding_layers": False}))
    return adapted


def by_peft(model: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def state(model: nn.Module) -> dict[str, Any]:
    """All that a failed load might have touched."""
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "classes": [type(m) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    tensors = before.pop("tensors"), after.pop("tensors")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    assert before == after


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of the config in `folder`; `...` deletes one."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, change: Any) -> None:
    """Let `change(tensors)` edit the tensors in `folder`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def changed_tensors(files: dict[str, bytes], change: Any) -> dict[str, bytes]:
    """The tensors in `files` (name -> content), edited by `change(tensors)`."""
    tensors = load(files["adapter_model.safetensors"])
    change(tensors)
    return {"adapter_model.safetensors": save(tensors, {"format": "pt"})}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in adapter_state_dict(model).items()}
