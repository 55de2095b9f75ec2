"""One row per layer type and variant: a small model, an input, a config, and whether PEFT is right there.

A new layer or variant gets a row here, and with it every contract test in tests/engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from lightning_lora.engine import Adapter, LoRAConfig, adapter_tensors, inject


class Written(nn.Linear):
    """A subclass with a forward of its own that is still linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Equal(nn.Module):
    """A layer type of a user's own, as in examples/own_layer.py: its weight enters times a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.5 * self.weight, self.bias)


class EqualLoRA(Adapter, adapts=Equal):
    @staticmethod
    def shapes(module: Equal, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, 8), (6, rank)

    def update(self, x: Tensor) -> Tensor:
        A, B, bias = self.factors_in(x.dtype)
        return F.linear(F.linear(self.lora_dropout(x), A), 0.5 * B, bias)


class Attention(nn.Module):
    """Self-attention of torch, which reads out_proj's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 8) -> (N, T, 8)
        return self.attention(x, x, x, need_weights=False)[0]


class SelfAttention(nn.Module):
    """Self-attention of torch, with what its projections may have."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
        kdim, vdim = self.layer.kdim, self.layer.vdim
        self.register_buffer("key", torch.linspace(-1, 1, 8 * kdim).view(8, kdim))
        self.register_buffer("value", torch.linspace(1, -1, 8 * vdim).view(8, vdim))

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 8) -> (N, T, 8)
        # Another key and value than x, so that the three projections are told apart.
        return self.layer(x, x @ self.key.to(x.dtype), x @ self.value.to(x.dtype), need_weights=False)[0]


class Recurrent(nn.Module):
    """Of a recurrent layer, the outputs alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (T, N, in) -> (T, N, out)
        return self.layer(x)[0]


class Steps(nn.Module):
    """A recurrent cell, unrolled."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # (T, N, in) -> (N, out)
        state: Any = None
        for step in x.unbind():
            state = self.layer(step, state)
        return state[0] if isinstance(state, tuple) else state


class Decoder(nn.Module):
    """torch's decoder layer, with what it decodes as its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, 8) -> (N, T, 8)
        return self.layer(x, x.flip(1))


class Pairwise(nn.Module):
    """A bilinear form of an input and its square."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (N, 4) -> (N, 3)
        return self.layer(x, x.square())


class Experts(nn.Module):
    """A mixture in which each row takes all of its experts, as transformers holds them: stacked parameters."""

    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.randn(3, 6, 4) / 2, torch.randn(3, 4, 6) / 2
        self.up = nn.Parameter(up.mT.contiguous() if is_transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if is_transposed else down)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:  # (N, 4) -> (N, 4)
        output = torch.zeros_like(x)
        for i in range(3):
            up, down = self.up[i], self.down[i]
            if self.is_transposed:
                up, down = up.T, down.T
            output = output + torch.tanh(x @ up.T + self.bias[i]) @ down.T
        return output


class ScaledEmbedding(nn.Embedding):
    """As in transformers' Gemma."""

    def __init__(self) -> None:
        super().__init__(11, 6)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


@dataclass(frozen=True)
class Case:
    """One kind of layer, adapted."""

    name: str
    layers: Callable[[], dict[str, nn.Module]]
    shape: tuple[int, ...]
    """Of the input; integers for a model that begins with an embedding."""
    config: dict[str, Any] = field(default_factory=dict)
    peft: str = ""
    """Why PEFT is no oracle here; empty where it is one."""
    differentiable: bool = True
    """Whether the gradient is that of the output: not so in DoRA, which takes the norm for a constant."""

    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(**{"rank": 2, "alpha": 3.0, "target_modules": ["layer"], **self.config})

    def model(self) -> nn.Module:
        """A fresh base whose values bfloat16 can hold, so a cast loses nothing by itself."""
        torch.manual_seed(1)
        model = nn.Sequential()
        for name, layer in self.layers().items():
            model.add_module(name, layer)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        return model

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in self.layers().values()):
            return torch.randint(0, 11, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).bfloat16().to(dtype)

    def adapted(self) -> nn.Module:
        """The model with adapters whose update is not zero, in eval mode."""
        model = self.model()
        inject(model, self.lora_config())
        randomise(model)
        return model.eval()


def randomise(model: nn.Module) -> None:
    """Give every adapter an update of about the size of its weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            last = name.rpartition(".")[2]
            if last.startswith(("lora_A", "lora_B")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif last.startswith("lora_magnitude_vector"):
                tensor.mul_(1 + torch.rand(tensor.shape, generator=generator))


def reference(model: nn.Module) -> nn.Module:
    """A plain float64 model with the weights W + s B A, by the formula and no code of ours.

    A frozen start is left out, s (B A - B0 A0). DoRA: m (W + s B A) / ||W + s B A||, the norm taken over all but the
    output's dimension.
    """
    plain = copy.deepcopy(model).double()
    for module in list(plain.modules()):
        if not isinstance(module, Adapter):
            continue
        if module.lora.parameters:
            _with_formula_in_parameters(module)
            continue
        A, B, W = (module._parameters[name].detach() for name in ("lora_A", "lora_B", "weight"))
        if isinstance(module, (_ConvNd, _ConvTransposeNd)) and (module.transposed or module.groups > 1):
            W, change = _by_groups(module, A, B, W)
        else:
            change = module.lora.scale * torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1))
        if (A0 := module._buffers.get("lora_A0")) is not None:
            change -= module.lora.scale * torch.einsum("or,ri->oi", module.lora_B0.flatten(1), A0.flatten(1))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, Conv1D)):
            change = change.T
        V = W + change.view(W.shape)
        out = 1 if isinstance(module, (nn.Embedding, nn.EmbeddingBag, Conv1D, _ConvTransposeNd)) else 0
        if (m := module._parameters.get("lora_magnitude_vector")) is not None:
            others = tuple(d for d in range(V.dim()) if d != out)
            V = (
                V
                / V.square().sum(others, keepdim=True).sqrt()
                * m.view([-1 if d == out else 1 for d in range(V.dim())])
            )
        if (b := module._parameters.get("lora_B_bias")) is not None:
            module.bias = nn.Parameter(module._parameters["bias"] + module.lora.scale * b)
        for name in module.lora_names:
            delattr(module, name)
        module.__class__ = type(module).base_class
        module.weight = nn.Parameter(V.detach())
    return plain


def _by_groups(module: Any, A: Tensor, B: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of a convolution, without groups but for a transposed one, and its change, group by group."""
    groups, s = module.groups, module.lora.scale
    if module.transposed:
        each = zip(A.flatten(1).chunk(groups), B.chunk(groups))
        return W, s * torch.cat([torch.einsum("ri,or...->io...", a, b) for a, b in each])
    module.groups = 1
    whole = W.new_zeros(len(W), W.shape[1] * groups, *W.shape[2:])
    for rows, columns, block in zip(whole.chunk(groups), range(groups), W.chunk(groups)):
        rows[:, columns * W.shape[1] : (columns + 1) * W.shape[1]] = block
    each = zip(A.chunk(groups), B.flatten(1).chunk(groups))
    return whole, s * torch.cat([torch.einsum("ri...,or->oi...", a, b) for a, b in each])


def _with_formula_in_parameters(module: Any) -> None:
    values: dict[str, Tensor] = {}
    for pair in module.lora_pairs(""):
        A, B, P = pair.A.detach(), pair.B.detach(), module._parameters[pair.parameter].detach()
        m = module._parameters.get(f"lora_magnitude_vector_{pair.parameter}")
        is_transposed = P.dim() == 3 and getattr(module, "is_transposed", False)
        M = P.mT if is_transposed else P
        if M.dim() == 2:
            V = M + pair.spec.scale * B @ A
        else:
            stacked_A, stacked_B = A.view(len(M), -1, M.shape[2]), B.view(M.shape[1], -1, len(M))
            V = M + pair.spec.scale * torch.einsum("ore,eri->eoi", stacked_B, stacked_A)
        if m is not None:
            over = (1, 2) if isinstance(module, nn.Bilinear) else (-1,)
            V = m.detach().view(*m.shape, *(1,) * (V.dim() - m.dim())) * V / V.square().sum(over, keepdim=True).sqrt()
        values[pair.parameter] = V.mT if is_transposed else V
    for name in module.lora_names:
        del module._parameters[name]
    module.__class__ = type(module).base_class
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value.contiguous()))


def _conv(dimensions: int, **options: Any) -> Callable[[], dict[str, nn.Module]]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return lambda: {"layer": kind(4, 6, 3, **options), "act": nn.Tanh()}


def _transposed(dimensions: int, **options: Any) -> Callable[[], dict[str, nn.Module]]:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    return lambda: {"layer": kind(4, 6, 3, **options), "act": nn.Tanh()}


def _linear(**options: Any) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"layer": nn.Linear(8, 6, **options), "act": nn.Tanh(), "head": nn.Linear(6, 3)}


def _steps(kind: Any) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"layer": Steps(kind(4, 6))}


def _embedding(**options: Any) -> dict[str, nn.Module]:
    return {"layer": nn.Embedding(11, 6, **options), "head": nn.Linear(6, 3)}


_PADS = "PEFT pads A's input with zeros, whatever the base's padding_mode"
_OTHER_BASE = "PEFT changes the base; tests/engine/test_inits.py compares"
_NO_PEFT = "PEFT has no adapter for it"
_BOTH = ["layer", "head"]
_NO_DORA = dict.fromkeys(("linear-parameter", "experts", "experts-transposed"), "PEFT has no DoRA for parameters")
_DORA = {
    "linear",
    "linear-without-bias",
    "linear-rslora",
    "transformers-conv1d",
    "embedding",
    "embedding-scaled",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv2d-stride-padding",
    "conv-transpose2d",
    "conv-transpose3d",
    "embedding-bag",
    "conv2d-padding-same-reflect-dilated",
    "multihead-attention",
    "transformer-encoder-layer",
    "own-layer",
    "linear-parameter",
    "experts",
    "experts-transposed",
    "lstm",
    "lstm-bidirectional-projected",
    "LSTMCell",
    "bilinear",
    "attention-packed",
    "attention-separate",
}

CASES = [
    Case("linear", _linear(), (5, 8)),
    Case("linear-without-bias", _linear(bias=False), (5, 3, 8), {"init": "gaussian"}),
    Case("linear-subclass", lambda: {"layer": Written(8, 6), "act": nn.Tanh()}, (5, 8)),
    Case("linear-rslora", _linear(), (5, 8), {"use_rslora": True, "rank": 4}),
    Case(
        "linear-patterns",
        _linear(),
        (5, 8),
        {"target_modules": _BOTH, "rank_pattern": {"head": 1}, "alpha_pattern": {"layer": 7}},
    ),
    Case("linear-bias-all", _linear(), (5, 8), {"bias": "all"}),
    Case("linear-bias-lora-only", _linear(), (5, 8), {"bias": "lora_only"}),
    Case("linear-modules-to-save", _linear(), (5, 8), {"modules_to_save": ["head"]}),
    Case("transformers-conv1d", lambda: {"layer": Conv1D(6, 8), "act": nn.Tanh()}, (5, 3, 8)),
    Case("embedding", _embedding, (5, 4)),
    Case(
        "embedding-padding-idx",
        lambda: _embedding(padding_idx=0),
        (5, 4),
        {"target_modules": _BOTH},
    ),
    Case("embedding-scaled", lambda: {"layer": ScaledEmbedding()}, (5, 4)),
    Case("conv1d", _conv(1), (2, 4, 9)),
    Case("conv2d", _conv(2), (2, 4, 7, 7)),
    Case("conv3d", _conv(3), (2, 4, 5, 5, 5)),
    # Long, so that it is convolved with W + s B A in one.
    Case("conv1d-in-one", _conv(1), (4, 4, 20)),
    Case("conv2d-in-one", _conv(2, stride=2, padding=1, padding_mode="reflect"), (4, 4, 12, 12), peft=_PADS),
    Case("conv1d-stride-padding", _conv(1, stride=2, padding=1, bias=False), (2, 4, 9)),
    Case("conv2d-stride-padding", _conv(2, stride=(2, 1), padding=(1, 2)), (2, 4, 7, 7)),
    Case("conv2d-padding-same", _conv(2, padding="same"), (2, 4, 7, 7)),
    Case(
        "conv2d-padding-same-reflect-dilated",
        _conv(2, padding="same", dilation=2, padding_mode="reflect"),
        (2, 4, 7, 7),
        peft=_PADS,
    ),
    Case("conv1d-dilation", _conv(1, dilation=2), (2, 4, 9), peft="PEFT crashes on a dilated convolution"),
    Case("conv3d-dilation", _conv(3, dilation=2, padding=2), (1, 4, 5, 5, 5), peft="PEFT crashes on dilation"),
    Case("conv2d-reflect", _conv(2, padding=1, padding_mode="reflect"), (2, 4, 7, 7), peft=_PADS),
    Case("conv2d-circular", _conv(2, padding=1, padding_mode="circular", stride=2), (2, 4, 7, 7), peft=_PADS),
    Case("conv1d-replicate", _conv(1, padding=2, padding_mode="replicate"), (2, 4, 9), peft=_PADS),
    Case("conv2d-groups", _conv(2, groups=2, stride=2), (2, 4, 7, 7), {"rank": 4}),
    Case("conv1d-depthwise", lambda: {"layer": nn.Conv1d(4, 8, 3, groups=4), "act": nn.Tanh()}, (2, 4, 9), {"rank": 4}),
    Case("conv-transpose1d", _transposed(1, stride=2, padding=1), (2, 4, 9), peft=_NO_PEFT),
    Case("conv-transpose2d", _transposed(2, stride=3, output_padding=(1, 2), dilation=2), (2, 4, 3, 3), peft=_NO_PEFT),
    Case("conv-transpose3d", _transposed(3, bias=False), (1, 4, 3, 3, 3), peft=_NO_PEFT),
    Case("conv-transpose2d-groups", _transposed(2, groups=2, stride=2), (2, 4, 5, 5), {"rank": 4}, peft=_NO_PEFT),
    Case("embedding-bag", lambda: {"layer": nn.EmbeddingBag(11, 6), "head": nn.Linear(6, 3)}, (5, 4), peft=_NO_PEFT),
    Case(
        "embedding-bag-sum-of-the-unpadded",
        lambda: {"layer": nn.EmbeddingBag(11, 6, mode="sum", padding_idx=0), "head": nn.Linear(6, 3)},
        (5, 4),
        peft=_NO_PEFT,
    ),
    Case(
        "multihead-attention",
        lambda: {"layer": Attention()},
        (2, 5, 8),
        {"target_modules": ["out_proj"]},
        peft="PEFT wraps out_proj, which nobody calls",
    ),
    Case(
        "transformer-encoder-layer",
        lambda: {"layer": nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), "head": nn.Linear(8, 3)},
        (2, 5, 8),
        {"target_modules": "all-linear"},
        peft="PEFT wraps out_proj, which nobody calls",
    ),
]

_STACK = {"target_modules": [], "target_parameters": ["layer.up", "layer.down"]}
CASES += [
    Case("own-layer", lambda: {"layer": Equal(), "act": nn.Tanh()}, (5, 8), peft=_NO_PEFT),
    Case("linear-parameter", _linear(), (5, 8), {"target_modules": ["head"], "target_parameters": ["layer.weight"]}),
    Case("experts", lambda: {"layer": Experts()}, (40, 4), {**_STACK, "rank_pattern": {"layer.down": 3}}),
    Case("experts-transposed", lambda: {"layer": Experts(is_transposed=True)}, (40, 4), _STACK),
    Case("lstm", lambda: {"layer": Recurrent(nn.LSTM(4, 6))}, (3, 2, 4), {"target_modules": ["layer.layer"]}, _NO_PEFT),
    Case(
        "lstm-bidirectional-projected",
        lambda: {"layer": Recurrent(nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, proj_size=3))},
        (3, 2, 4),
        {"target_modules": ["layer.layer"]},
        _NO_PEFT,
    ),
    Case("gru", lambda: {"layer": Recurrent(nn.GRU(4, 6))}, (3, 2, 4), {"target_modules": ["layer.layer"]}, _NO_PEFT),
    Case(
        "rnn-without-bias",
        lambda: {"layer": Recurrent(nn.RNN(4, 6, bias=False))},
        (3, 2, 4),
        {"target_modules": ["layer.layer"]},
        _NO_PEFT,
    ),
    *(
        Case(
            kind.__name__,
            _steps(kind),
            (3, 2, 4),
            {"target_modules": ["layer.layer"]},
            _NO_PEFT,
        )
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ),
    Case("bilinear", lambda: {"layer": Pairwise()}, (5, 4), {"target_modules": ["layer.layer"]}, _NO_PEFT),
    Case(
        "attention-packed",
        lambda: {"layer": SelfAttention()},
        (2, 5, 8),
        {"target_modules": ["layer.layer"]},
        peft="PEFT adds the update of out_proj twice (tests/engine/test_attention.py)",
    ),
    Case(
        "attention-separate",
        lambda: {"layer": SelfAttention(kdim=6, vdim=4, add_bias_kv=True, add_zero_attn=True)},
        (2, 5, 8),
        {"target_modules": ["layer.layer"]},
        peft="PEFT refuses separate projections",
    ),
    Case(
        "attention-sequence-first",
        lambda: {"layer": SelfAttention(batch_first=False, bias=False, add_bias_kv=True)},
        (2, 5, 8),
        {"target_modules": ["layer.layer"]},
        peft="PEFT finds no bias_k in its wrapper",
    ),
    Case(
        "transformer-decoder-layer",
        lambda: {"layer": Decoder()},
        (2, 5, 8),
        {"target_modules": ["linear1", "linear2", "self_attn", "multihead_attn"]},
        peft="PEFT's attention has not all that torch's decoder asks for",
    ),
]

CASES += [
    Case(
        f"{case.name}-dora",
        case.layers,
        case.shape,
        {**case.config, "use_dora": True},
        case.peft or _NO_DORA.get(case.name, ""),
        differentiable=False,
    )
    for case in CASES
    if case.name in _DORA
] + [
    Case("linear-lora-bias", _linear(), (5, 8), {"lora_bias": True}),
    Case("conv2d-lora-bias", _conv(2, stride=2), (2, 4, 7, 7), {"lora_bias": True}),
    Case("conv-transpose2d-lora-bias", _transposed(2, stride=2), (2, 4, 5, 5), {"lora_bias": True}, peft=_NO_PEFT),
    Case("conv2d-groups-lora-bias", _conv(2, groups=2), (2, 4, 7, 7), {"lora_bias": True, "rank": 4}),
    Case("linear-freeze-a", _linear(), (5, 8), {"freeze_a": True}, peft="PEFT has it as an optimizer"),
    Case("embedding-freeze-a", _embedding, (5, 4), {"freeze_a": True}, peft="PEFT has it as an optimizer"),
    *(
        Case(
            f"{name}-{init}", layers, shape, {"init": init, **more}, _OTHER_BASE, differentiable="use_dora" not in more
        )
        for name, layers, shape, init, more in [
            ("linear", _linear(), (5, 8), "pissa", {}),
            ("linear-dora", _linear(), (5, 8), "pissa", {"use_dora": True}),
            ("linear-freeze-a", _linear(), (5, 8), "pissa", {"freeze_a": True}),
            ("linear-rank-dropout", _linear(), (5, 8), "pissa", {"rank_dropout": 0.5}),
            ("transformers-conv1d", lambda: {"layer": Conv1D(6, 8), "act": nn.Tanh()}, (5, 3, 8), "olora", {}),
            ("conv2d", _conv(2, stride=2), (2, 4, 7, 7), "pissa", {}),
        ]
    ),
    Case(
        "linear-rank-and-module-dropout", _linear(), (5, 8), {"rank_dropout": 0.5, "module_dropout": 0.1}, peft="none"
    ),
]

IDS = [case.name for case in CASES]
PEFT_CASES = [case for case in CASES if not case.peft]
