"""The fused step is the formula, keeps no more than it needs, and drops what it should."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lightning_lora.engine import fused
from tests.engine.fused_step import (
    RATES,
    SCALE,
    USES,
    both,
    call,
    every_rate,
    formula,
    gradients,
    kept_by,
    rounded,
    saved_by,
    tensors,
)


@both
@every_rate
@pytest.mark.parametrize("wants", ["x base b A B", "x", "b base A", "A", "B", "A B", "x B", "x A"])
def test_gradients_and_their_gradients_are_those_of_finite_differences(way: str, p: float, wants: str):
    t = tensors(2, 2, 4, wants=wants)
    used = [n for n in USES[way] if n in wants.split()]

    def function(*given: Tensor) -> Tensor:
        torch.manual_seed(0)
        return call(way, t | dict(zip(used, given)), p)

    assert gradcheck(function, [t[n] for n in used])
    assert gradgradcheck(function, [t[n] for n in used])


@both
@every_rate
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5), (2, 0, 5)], ids=str)
def test_output_and_gradients_are_those_of_the_formula(way: str, p: float, shape: tuple[int, ...]):
    t = tensors(*shape)
    kept = kept_by(7, shape, p)
    torch.manual_seed(7)
    y, exact = call(way, t, p), formula(way, t, kept)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(gradients(way, t, y), gradients(way, t, exact))


@both
def test_layouts_of_input_and_gradient_do_not_matter(way: str):
    t = tensors(3, 4, 5)
    for x in (t["x"].mT.contiguous().mT, t["x"][::2], t["x"].transpose(0, 1), t["x"][:1].expand(3, 4, 5)):
        base = torch.zeros(*x.shape[:-1], 6, dtype=torch.float64)
        given = t | {"x": x, "base": base}
        y, exact = call(way, given), formula(way, given)
        torch.testing.assert_close(y, exact)
        for reduced in (lambda y: y.sum(), lambda y: y.mT.flatten() @ torch.arange(y.numel(), dtype=y.dtype)):
            ours, theirs = (torch.autograd.grad(reduced(out), t["A"], retain_graph=True) for out in (y, exact))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tiles", [False, True], ids=["", "AMX"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [3, 8, 12, 16, 40])
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(16, 32, 1024), (16, 1024, 32), (24, 4096, 2048), (12, 1024, 1024)])
def test_shapes_that_are_computed_in_ways_of_their_own_are_no_exception(
    n: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype, tiles: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fused, "has_tiles", lambda: tiles)  # products are laid out for such a processor, on this one
    generator = torch.Generator().manual_seed(rank)
    sizes = {"x": (n, d_in), "W": (d_out, d_in), "A": (rank, d_in), "B": (d_out, rank)}
    t = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    weights = torch.randn(n, d_out, generator=generator).to(dtype)
    trained = {name: t[name].requires_grad_() for name in ("x", "A", "B")}
    y = fused.linear(t["x"], t["W"], None, t["A"], t["B"], SCALE)
    expected = rounded("linear", t, dtype, weights)
    assert_rounded(y, expected["y"], "the output")
    for name, gradient in zip(trained, torch.autograd.grad(y, list(trained.values()), weights)):
        assert_rounded(gradient, expected[name], f"the gradient of {name}")


def test_a_layer_without_bias_and_a_weight_that_is_trained_too():
    t = tensors(4, 5, wants="x W A B")
    y = fused.linear(t["x"], t["W"], None, t["A"], t["B"], SCALE)
    exact = formula("linear", t | {"b": torch.zeros(6, dtype=torch.float64)})
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), t["W"]), torch.autograd.grad(exact.sum(), t["W"]))


@both
@pytest.mark.parametrize("kind", ["leaf", "view", "needed by what made it"])
def test_what_the_update_is_added_to_is_left_as_it_was(way: str, kind: str):
    t = tensors(4, 5)
    base = {"leaf": t["base"], "view": t["base"][:], "needed by what made it": t["base"].exp()}[kind]
    before, x = base.detach().clone(), t["x"].detach().clone()
    y = call(way, t | {"base": base})
    assert base.equal(before)
    assert t["x"].equal(x)
    y.sum().backward()  # raises where something that is needed was changed in place


# What is kept for the backward pass.


@both
@pytest.mark.parametrize(
    ("wants", "expected"),
    [
        ("x A B", 64 * 32 + 4 * 64),
        ("A B", 64 * 32 + 4 * 64),
        ("x B", 4 * 64),
        ("x", 0),
        ("x A", 64 * 32),
        ("B", 4 * 64),
    ],
)
def test_x_is_kept_for_the_gradient_of_A_alone_and_beside_it_only_H(way: str, wants: str, expected: int):
    t = tensors(64, 32, dtype=torch.float32, wants=wants, rank=4)
    others = [t[n] for n in ("W", "A", "B", "base", "b")]
    assert saved_by(lambda: call(way, t), *others) == expected


@pytest.mark.parametrize(("p", "most"), [(0.05, 0.06), (0.4, 0.25), (0.7, 0.25)])
def test_dropout_keeps_a_position_for_what_is_dropped_or_a_byte_for_each_element(p: float, most: float):
    t = tensors(256, 64, dtype=torch.float32, wants="x A B")
    extra = saved_by(lambda: call("linear", t, p)) - saved_by(lambda: call("linear", t))
    assert 0 < extra <= most * t["x"].numel()


@both
def test_nothing_is_kept_where_no_gradient_is_wanted(way: str):
    t = tensors(4, 5)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert saved_by(lambda: call(way, t)) == 0
            y = call(way, t)
        assert not y.requires_grad
        assert y.is_inference() == isinstance(mode, torch.inference_mode)
        torch.testing.assert_close(y.clone(), formula(way, t).detach())


def test_saved_tensors_pass_through_hooks_of_the_user():
    t = tensors(4, 5)
    with torch.autograd.graph.save_on_cpu():
        y = call("linear", t, 0.2)
    torch.autograd.grad(y.sum(), t["A"])


def test_a_change_of_the_input_before_the_backward_pass_is_an_error():
    t = tensors(4, 5, wants="A B")
    y = call("linear", t)
    t["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Dropout.


@pytest.mark.parametrize("p", [0.01, 0.05, 0.2, 0.25, 0.4, 0.5, 0.7, 0.99])
def test_each_element_is_dropped_with_the_given_probability_and_the_mean_is_kept(p: float):
    kept = kept_by(1, (3000, 100), p)
    assert set(kept.unique().tolist()) == {0.0, 1 / (1 - p)}
    dropped = (kept == 0).double()
    # Five standard deviations: over all, in each column, next to each other in a row, and in one column.
    sigma = math.sqrt(p * (1 - p))
    assert abs(dropped.mean() - p) < 5 * sigma / math.sqrt(dropped.numel())
    assert (dropped.mean(0) - p).abs().max() < 5 * sigma / math.sqrt(3000)
    for one, next_ in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])):
        covariance = ((one - p) * (next_ - p)).mean()
        assert abs(covariance) < 5 * sigma**2 / math.sqrt(one.numel())


@pytest.mark.parametrize("p", RATES[1:], indirect=True)
def test_dropout_alone_drops_what_the_fused_step_drops(p: float):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(6)
    y = fused.dropout(x, p)
    torch.testing.assert_close(y, x * kept_by(6, (3, 4, 5), p))

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(6)
        return fused.dropout(x, p)

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)
    assert fused.dropout(x, 0.0) is x


def test_dropout_alone_keeps_positions():
    assert saved_by(lambda: fused.dropout(torch.randn(10_000, requires_grad=True), 0.05)) <= 0.1 * 10_000


def test_dropout_alone_keeps_the_layout_of_images():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert fused.dropout(x, 0.2).is_contiguous(memory_format=torch.channels_last)


def test_gaps_between_dropped_elements_are_geometric():
    at = fused._rare_positions(2_000_000, 0.05)
    gaps = at.diff() - 1
    for gap in range(40):
        expected = 0.05 * 0.95**gap
        sigma = math.sqrt(expected * (1 - expected) / len(gaps))
        assert abs((gaps == gap).double().mean() - expected) < 5 * sigma


def test_positions_go_on_where_the_first_draw_was_not_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "_DEVIATIONS", -30.0)
    at = fused._rare_positions(100_000, 0.1)
    assert (at.diff() > 0).all()
    assert at[0] >= 0
    assert at[-1] < 100_000
    assert abs(len(at) - 10_000) < 5 * math.sqrt(100_000 * 0.1 * 0.9)
    assert abs((at >= 50_000).sum() - 5_000) < 5 * math.sqrt(50_000 * 0.1 * 0.9)


@pytest.mark.parametrize("p", [1e-300, 1e-9, 1 - 1e-9])
def test_probabilities_next_to_none_and_all(p: float):
    kept = kept_by(0, (50, 20), p)
    assert ((kept == 0) == (p > 0.5)).all()


@every_rate
def test_dropout_follows_torchs_seed_whether_or_not_gradients_are_wanted(p: float):
    t = tensors(8, 5)
    outputs = []
    for seed, grad in ((3, True), (3, False), (4, True)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            outputs.append(call("linear", t, p).detach())
    assert outputs[0].equal(outputs[1])
    assert outputs[0].equal(outputs[2]) == (p == 0)


def test_dropout_does_not_depend_on_default_dtype_and_device():
    expected = kept_by(5, (4, 8), 0.2)
    torch.set_default_dtype(torch.float64)
    try:
        assert kept_by(5, (4, 8), 0.2).equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_device_than_the_cpu_draws_a_mask_and_never_waits_for_its_size():
    t = {name: tensor.to("meta").detach().requires_grad_() for name, tensor in tensors(4, 5).items()}
    y = fused.linear(t["x"], t["W"].detach(), None, t["A"], t["B"], SCALE, 0.1)
    y.sum().backward()
    assert t["A"].grad.shape == (3, 5)
