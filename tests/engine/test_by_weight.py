"""Layers whose own forward does more with their weight than multiply by it: they compute with W + s B A in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomise, reference
from snapshot import assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine import Adapter, LoRAConfig, inject, merge, merged, remove
from lightning_lora.engine.bank import Bank
from lightning_lora.errors import TargetError

LINEAR = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Masked(nn.Linear):  # as in MADE
    def __init__(self) -> None:
        super().__init__(8, 6)
        self.register_buffer("mask", (torch.arange(48).view(6, 8) % 3 > 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Cosine(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Halved(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Rounded(nn.Linear):  # quantization-aware training: the gradient passes by the rounding
    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        step = 2.0**-7
        W = self.weight
        return F.linear(x, W + ((W / step).round() * step - W).detach(), self.bias)


class Positive(nn.Linear):
    """Its input has three dimensions, and it takes more arguments."""

    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, features: Tensor, gain: float = 2.0, *, shift: float = 1.0) -> Tensor:
        return gain * F.linear(features, F.softplus(self.weight), self.bias) + shift


class Scaled(nn.Linear):
    """With its defaults, it multiplies by its weight and does nothing else."""

    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return F.linear(x, gain * self.weight, self.bias)


class MaskedInPlace(nn.Conv2d):  # as most PixelCNNs do
    def __init__(self) -> None:
        super().__init__(3, 4, 3, padding=1)
        self.register_buffer("mask", (torch.arange(9).view(3, 3) < 4).float())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Standardised(nn.Conv2d):
    """What it convolves with is not its weight."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)


class PadsItself(nn.Conv2d):  # as timm's Conv2dSame
    def __init__(self) -> None:
        super().__init__(3, 4, 4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias, self.stride)


class Flipped(nn.ConvTranspose2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return F.conv_transpose2d(x, self.weight.flip(-1), self.bias)


class NormalisedInPlace(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight))
        return super().forward(x)


KINDS = [
    (Masked, LINEAR),
    (Cosine, LINEAR),
    (Halved, LINEAR),
    (Rounded, LINEAR),
    (Positive, LINEAR),
    (Scaled, LINEAR),
    (MaskedInPlace, IMAGE),
    (Standardised, IMAGE),
    (PadsItself, IMAGE),
    (Flipped, IMAGE),
]
every_kind = pytest.mark.parametrize(("kind", "x"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])


def adapted(kind: type[nn.Module], **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(kind()).double().eval()
    inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["0"], **fields}))
    return model


@every_kind
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "DoRA"])
def test_output_and_gradients_are_those_of_the_class_with_the_adapted_weight(kind: Any, x: Tensor, use_dora: bool):
    model = adapted(kind, use_dora=use_dora)
    fresh = copy.deepcopy(model)
    remove(fresh)
    assert model(x).equal(fresh(x))
    randomise(model)
    torch.testing.assert_close(model(x), reference(model)(x))
    layer: Any = model[0]
    if use_dora:
        return  # its norm is taken for a constant
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    if kind is Flipped:
        change = layer.lora.scale * torch.einsum("ri,or...->io...", A.flatten(1), B)
    else:
        change = layer.lora.scale * torch.einsum("or,ri->oi", B.flatten(1), A.flatten(1))
    base = fresh[0]
    W = base._parameters.pop("weight").detach()
    base.weight = W + change.view(W.shape)  # in place of the parameter, as a plain tensor that has a gradient
    weights = torch.randn_like(model(x))
    ours = torch.autograd.grad((model(x) * weights).sum(), (layer.lora_A, layer.lora_B))
    torch.testing.assert_close(ours, torch.autograd.grad((fresh(x) * weights).sum(), (A, B)))


@every_kind
def test_it_is_merged_exactly_and_removed_bit_for_bit(kind: Any, x: Tensor):
    torch.manual_seed(0)
    model = nn.Sequential(kind()).double().eval()
    model(x)  # a class that masks its weight in place has done so
    before, base = snapshot(model), model(x)
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    randomise(model)
    output = model(x).detach()
    assert not torch.allclose(output, base)
    twin = copy.deepcopy(model)
    with merged(model):
        torch.testing.assert_close(model(x), output)
    merge(twin)
    torch.testing.assert_close(twin(x), output)
    remove(model)
    assert_same(snapshot(model), before)
    assert model(x).equal(base)


def test_an_argument_that_has_a_default_may_change_what_is_done_with_the_weight():
    model: Any = adapted(Scaled)
    randomise(model)
    torch.testing.assert_close(model[0](LINEAR, gain=3.0), reference(model)[0](LINEAR, gain=3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.int8])
def test_a_mask_of_ones_may_mask_later(dtype: torch.dtype):
    class MaskedLater(nn.Linear):  # as in pruning while it trains
        def __init__(self) -> None:
            super().__init__(8, 6)
            self.register_buffer("mask", torch.ones(6, 8).to(dtype))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.mask, self.bias)

    model: Any = adapted(MaskedLater)
    randomise(model)
    model[0].mask[::2] = 0
    torch.testing.assert_close(model(LINEAR), reference(model)(LINEAR))


def test_a_class_that_adds_nothing_to_the_product_keeps_the_fast_way():
    class Written(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    class Noisy(Written):
        def forward(self, x: Tensor) -> Tensor:  # the noise is no matter of the weight
            return super().forward(x) + torch.randn(6, dtype=x.dtype)

    class OfThree(Written):
        def forward(self, x: Tensor) -> Tensor:
            rows, positions, _ = x.shape
            return super().forward(x.reshape(rows * positions, -1)).view(rows, positions, -1)

    class Counting(Written):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("calls", torch.tensor(0))
            self.shift = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.shift

    for kind in (Written, Noisy, OfThree, Counting):
        layer: Any = nn.Sequential(kind(8, 6))
        state = torch.get_rng_state()
        inject(layer, LoRAConfig(rank=2, init="pissa", target_modules=["0"]))
        assert torch.get_rng_state().equal(state), "the trial drew from the run's own random numbers"
        assert not layer[0].lora_by_weight
    model = adapted(Masked)
    assert isinstance(model[0], Adapter)
    assert model[0].lora_by_weight


@pytest.mark.parametrize("width", [8, 64, 1024])
def test_one_number_that_is_masked_is_enough(width: int):
    class MasksOne(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones_like(self.weight)
            mask[3, width // 2] = 0
            return F.linear(x, self.weight * mask, self.bias)

    model: Any = nn.Sequential(MasksOne(width, width))
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert model[0].lora_by_weight


@pytest.mark.parametrize("width", [8, 1024, 8192])
def test_rounding_alone_is_no_reason(width: int):
    class Written(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    model: Any = nn.Sequential(Written(width, 64))
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert not model[0].lora_by_weight


def test_a_forward_that_does_not_use_the_weight_is_refused():
    class Fused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 6)
            self.packed = self.weight.detach().t().clone()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.packed + self.bias

    model = nn.Sequential(Fused())
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'0' \(Fused\).*would have no effect"):
        inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert_same(snapshot(model), before)


def test_a_grouped_convolution_with_a_forward_of_its_own_is_refused():
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    with pytest.raises(TargetError, match=r"'0' \(Padded\).*groups=2"):
        inject(nn.Sequential(Padded(4, 4, 3, groups=2)), LoRAConfig(rank=2, target_modules=["0"]))


@pytest.mark.parametrize(
    "stored",
    [lambda W: W.to(torch.complex64), Tensor.to_sparse_csr, Tensor.to_sparse],
    ids=["complex", "csr", "coo"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_complex_and_sparse_weights_are_refused(stored: Callable[[Tensor], Tensor]):
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(stored(torch.eye(6, 8)))
    with pytest.raises(TargetError, match="adapters are real and dense"):
        inject(nn.Sequential(layer), LoRAConfig(rank=2, target_modules=["0"]))


def test_dropout_is_on_the_columns_of_a_and_keeps_the_mean():
    torch.manual_seed(0)
    model = adapted(Masked, dropout=0.5).train()
    randomise(model)
    x = LINEAR[:1]
    draws = torch.stack([model(x).detach() for _ in range(4000)])
    spread = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - model.eval()(x)).abs() <= 5 * spread).all()
    assert draws.std(0).max() > 0


@every_kind
def test_a_bank_which_adds_updates_to_outputs_refuses_it_by_name(kind: Any, x: Tensor):
    model = nn.Sequential(kind()).double()
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"^'0'"):
        Bank(model, capacity=1, max_rank=2, target_modules=["0"])
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_what_a_forward_changes_in_place_is_what_it_reads_next(grad: bool, fullgraph: bool):
    torch._dynamo.reset()
    model = adapted(NormalisedInPlace)
    randomise(model)
    layer: Any = model[0]
    A, B = layer.lora_A.detach(), layer.lora_B.detach().clone().requires_grad_()
    W = layer._parameters["weight"].detach() + layer.lora.scale * B @ A
    with torch.no_grad():
        W.copy_(F.normalize(W))
    expected = F.linear(LINEAR, W, layer.bias)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(LINEAR), expected)
        y = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)(LINEAR)
    torch.testing.assert_close(y, expected)
    if grad:
        torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.lora_B), torch.autograd.grad(expected.sum(), B))


def test_a_forward_that_breaks_the_graph_of_torch_compile_adds_the_update_once():
    class Breaks(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x @ self.weight.t() + self.bias

    torch._dynamo.reset()
    model: Any = adapted(Breaks)
    randomise(model)
    assert not model[0].lora_by_weight
    expected = reference(model)(LINEAR)
    torch.testing.assert_close(model(LINEAR), expected)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(LINEAR), expected)
