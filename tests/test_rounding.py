"""The bounds of rounding.py hold for every order of summation, and no fault passes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rounding import Condition, Rounded, assert_rounded
from torch import Tensor, nn
from torch.nn import functional as F

N, D_IN, D_OUT, RANK, SCALE, P = 24, 512, 96, 8, 0.7, 0.2
SEEDS = range(40)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def summed_in(order: Callable[[int], list[Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
    """X W^T with one sum for each part of the inner dimension, and the sums added one by one, in float32."""

    def linear(X: Tensor, W: Tensor) -> Tensor:
        total = X.new_zeros(X.shape[0], W.shape[0], dtype=torch.float32)
        for part in order(X.shape[1]):
            total = total + X[:, part].float() @ W[:, part].float().T
        return total.to(X.dtype)

    return linear


def added_in_its_own_dtype(X: Tensor, W: Tensor) -> Tensor:
    total = X.new_zeros(X.shape[0], W.shape[0])
    for i in range(X.shape[1]):
        total += X[:, i, None] * W[:, i]
    return total


ORDERS = {
    "torch": F.linear,
    "backwards": lambda X, W: F.linear(X.flip(1), W.flip(1)),
    "in float64": lambda X, W: (X.double() @ W.double().T).to(X.dtype),
    "one by one": summed_in(lambda k: list(torch.arange(k).split(1))),
    "in blocks": summed_in(lambda k: list(torch.arange(k).split(7))),
    "in strides": summed_in(lambda k: [torch.arange(i, k, 16) for i in range(min(16, k))]),
}


def step(linear: Callable[[Tensor, Tensor], Tensor], t: dict[str, Tensor], scale: float = SCALE) -> Tensor:
    return linear(t["x"], t["W"]) + scale * linear(linear(t["x"] * t["kept"], t["A"]), t["B"])


FAULTS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "the scale twice": lambda t: step(F.linear, t, SCALE**2),
    "twice the scale": lambda t: step(F.linear, t, 2 * SCALE),
    "no update": lambda t: F.linear(t["x"], t["W"]),
    "nothing is dropped": lambda t: step(F.linear, t | {"kept": torch.ones_like(t["kept"])}),
    "what is kept is not multiplied by 1 / (1 - p)": lambda t: step(F.linear, t | {"kept": t["kept"].bool()}),
    "the base drops too": lambda t: step(F.linear, t | {"x": t["x"] * t["kept"]}),
    "another row's update": lambda t: step(F.linear, t | {"kept": t["kept"].roll(1, 0)}),
    "one rank is left out": lambda t: step(F.linear, t | {"B": t["B"] * (torch.arange(RANK) > 0)}),
}


def drawn(seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Rounded]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (N, D_IN), "W": (D_OUT, D_IN), "A": (RANK, D_IN), "B": (D_OUT, RANK)}
    t = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    t["kept"] = ((torch.rand(N, D_IN, generator=generator) > P) / (1 - P)).to(dtype)
    x, W, A, B = (Rounded.of(t[name], dtype) for name in sizes)
    return t, x @ W.T + (((x * t["kept"].double()) @ A.T) @ B.T) * SCALE


@every_dtype
@pytest.mark.parametrize("order", ORDERS)
def test_a_right_result_is_within_its_bound_however_it_is_summed(order: str, dtype: torch.dtype):
    for seed in SEEDS:
        t, expected = drawn(seed, dtype)
        assert_rounded(step(ORDERS[order], t), expected)


@every_dtype
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_outside_of_the_bound(fault: str, dtype: torch.dtype):
    for seed in SEEDS:
        t, expected = drawn(seed, dtype)
        with pytest.raises(AssertionError, match="times what rounding can explain"):
            assert_rounded(FAULTS[fault](t), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_is_kept_in_half_precision_is_outside_of_the_bound(dtype: torch.dtype):
    for seed in SEEDS:
        t, _ = drawn(seed, dtype)
        product = Rounded.of(t["x"], dtype) @ Rounded.of(t["W"], dtype).T
        assert product.excess(added_in_its_own_dtype(t["x"], t["W"])) > 1


def test_what_is_not_finite_is_outside_of_every_bound():
    t, expected = drawn(0, torch.float32)
    for value in (torch.nan, torch.inf):
        found = step(F.linear, t)
        found[3, 4] = value
        assert expected.excess(found) > 1


class Adapted(nn.Module):
    """Two layers, the first with an update; `gain` is 1 where the code is right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.gain = nn.Linear(32, 24), nn.Linear(24, 5), 1.0
        self.A, self.B = nn.Parameter(torch.randn(4, 32) / 6), nn.Parameter(torch.randn(24, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.A), self.B)
        return self.last((self.first(x) + self.gain * SCALE * update).tanh())


@every_dtype
def test_a_whole_model_is_within_its_bound_and_with_a_fault_it_is_not(dtype: torch.dtype):
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = Adapted().to(dtype)
        x = torch.randn(9, 32).to(dtype)
        condition = Condition(model, x)
        assert condition.excess(model(x)) <= 1
        for gain in (0.0, -1.0):
            model.gain = gain
            assert condition.excess(model(x)) > 1
        model.gain = torch.nan
        assert condition.excess(model(x)) > 1
