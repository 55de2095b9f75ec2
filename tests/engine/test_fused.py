"""The fused step is the formula, in every way that torch can look at it, and keeps no more than it needs."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora.engine import fused

SCALE = 0.7
RATES = [0.0, 0.2, 0.4, 0.7]
"""No dropout, positions, a mask, and a mask drawn from the positions that are kept."""
every_rate = pytest.mark.parametrize("p", RATES)
jvp_imports = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what torch itself imports
both = pytest.mark.parametrize("way", ["linear", "add_update", "update"])


def tensors(*shape: int, dtype: torch.dtype = torch.float64, wants: str = "x base b A B", rank: int = 3) -> dict:
    """x of the given shape, and what goes with it: 6 outputs."""
    generator = torch.Generator().manual_seed(len(shape))
    size = {
        "x": shape,
        "base": (*shape[:-1], 6),
        "W": (6, shape[-1]),
        "b": (6,),
        "A": (rank, shape[-1]),
        "B": (6, rank),
    }
    made = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in size.items()}
    return {name: t.requires_grad_(name in wants.split()) for name, t in made.items()}


def call(way: str, t: dict[str, Tensor], p: float = 0.0) -> Tensor:
    if way == "linear":
        return fused.linear(t["x"], t["W"], t["b"], t["A"], t["B"], SCALE, p)
    if way == "update":
        return fused.update(t["x"], t["A"], t["B"], p)
    return fused.add_update(t["base"], t["x"], t["A"], t["B"], SCALE, p)


def formula(way: str, t: dict[str, Tensor], kept: Tensor | float = 1.0) -> Tensor:
    """By torch's own functions; `kept` is 0 where x is dropped and 1 / (1 - p) elsewhere."""
    update = (t["x"] * kept) @ t["A"].T @ t["B"].T
    base = F.linear(t["x"], t["W"], t["b"]) if way == "linear" else t["base"]
    return update if way == "update" else base + SCALE * update


USES = {"linear": ("x", "b", "A", "B"), "add_update": ("x", "base", "A", "B"), "update": ("x", "A", "B")}


def kept_by(seed: int, shape: tuple[int, ...], p: float) -> Tensor:
    """What dropout multiplies an input of that shape with, seen through identities."""
    torch.manual_seed(seed)
    ones, eye = torch.ones(shape, dtype=torch.float64), torch.eye(shape[-1], dtype=torch.float64)
    return fused.add_update(torch.zeros_like(ones), ones, eye, eye, 1.0, p)


def gradients(way: str, t: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    used = [n for n in USES[way] if t[n].requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return dict(zip(used, torch.autograd.grad(y, [t[n] for n in used], weights)))


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


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(16, 32, 1024), (16, 1024, 32), (24, 2048, 1024), (12, 1024, 1024)])
def test_widths_at_which_rows_share_a_place_in_the_cache_are_no_exception(n: int, d_in: int, d_out: int):
    x, W, A, B = (torch.randn(size) for size in ((n, d_in), (d_out, d_in), (8, d_in), (d_out, 8)))
    t = [tensor.requires_grad_() for tensor in (x, A, B)]
    exact = [tensor.detach().double().requires_grad_() for tensor in t]
    y = fused.linear(x, W, None, A, B, SCALE)
    y_exact = exact[0] @ W.double().T + SCALE * exact[0] @ exact[1].T @ exact[2].T
    torch.testing.assert_close(y.double(), y_exact, rtol=1e-4, atol=1e-3)
    ours, theirs = (torch.autograd.grad(out.square().mean(), of) for out, of in ((y, t), (y_exact, exact)))
    torch.testing.assert_close([g.double() for g in ours], list(theirs), rtol=1e-4, atol=1e-4)


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


def saved_by(function: Callable[[], Tensor], *apart_from: Tensor) -> int:
    """Elements of the tensors that autograd keeps."""
    kept: dict[int, int] = {}
    known = {t.data_ptr() for t in apart_from}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(kept.values())


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


# Precision.


def narrow_errors(way: str, function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    """Errors of output and gradients against float64, where all is rounded to `dtype` but A and B are masters."""
    exact = {n: t.to(dtype).double() if n not in "AB" else t for n, t in tensors(*shape).items()}
    exact = {n: t.detach().requires_grad_(n != "W") for n, t in exact.items()}
    given = {n: t.detach().to(torch.float32 if n in "AB" else dtype).requires_grad_(n != "W") for n, t in exact.items()}
    y, y_exact = function(way, given), formula(way, exact)
    ours, theirs = gradients(way, given, y), gradients(way, exact, y_exact)
    assert all(ours[n].dtype == given[n].dtype for n in ours)
    pairs = {"y": (y, y_exact)} | {n: (ours[n], theirs[n]) for n in ours}
    return {n: float((one.double() - other).detach().square().mean().sqrt()) for n, (one, other) in pairs.items()}


def two_products(way: str, t: dict[str, Tensor]) -> Tensor:
    base = F.linear(t["x"], t["W"], t["b"]) if way == "linear" else t["base"]
    update = F.linear(F.linear(t["x"], t["A"].to(base.dtype)), t["B"].to(base.dtype))
    return update if way == "update" else base + SCALE * update


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (4, 40, 96)], ids=str)
def test_half_precision_loses_no_more_than_twice_what_two_products_and_a_sum_lose(way, dtype, shape):
    ours = narrow_errors(way, call, shape, dtype)
    theirs = narrow_errors(way, two_products, shape, dtype)
    for name, error in ours.items():
        assert error <= 2 * theirs[name], (name, error, theirs[name])


@both
@every_rate
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_that_of_the_tensors(way: str, p: float, inside: bool):
    t = tensors(16, 32, dtype=torch.float32)
    kept = kept_by(2, (16, 32), p).float()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(way, t | {"base": t["base"].bfloat16()}, p)
        assert y.dtype == torch.bfloat16
        if inside:
            found = gradients(way, t, y)
    if not inside:
        found = gradients(way, t, y)
    expected = gradients(way, t, formula(way, t, kept).bfloat16())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        # A few products with bfloat16's relative error of 1/256.
        torch.testing.assert_close(gradient, expected[name], rtol=0.05, atol=0.05 * float(expected[name].abs().max()))


def test_autocast_leaves_double_precision_alone():
    t = tensors(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call("linear", t), formula("linear", t))


def test_autocast_keeps_no_narrow_copy_of_the_frozen_weight():
    t = tensors(2, 512, dtype=torch.float32, wants="x A B")
    with torch.autocast("cpu", torch.bfloat16):
        kept = saved_by(lambda: call("linear", t), *(t[n] for n in "xWAB"))
    assert kept <= 3 * 2  # H


# What looks into the computation.


@both
@every_rate
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(way: str, p: float, reentrant: bool):
    t = tensors(2, 3, 5)
    names = list(t)

    def function(*given: Tensor) -> Tensor:
        return call(way, dict(zip(names, given)), p)

    torch.manual_seed(0)
    expected = gradients(way, t, function(*t.values()))
    torch.manual_seed(0)
    y = checkpoint(function, *t.values(), use_reentrant=reentrant)
    used = list(expected)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    torch.testing.assert_close({n: t[n].grad for n in used}, expected)


@jvp_imports
@both
def test_forward_mode_differentiation_agrees_with_the_formula(way: str):
    t = tensors(4, 5)
    for name in ("x", "A", "B"):
        tangent = torch.ones_like(t[name])
        with forward_ad.dual_level():
            given = t | {name: forward_ad.make_dual(t[name], tangent)}
            ours, exact = call(way, given), formula(way, given)
            torch.testing.assert_close(forward_ad.unpack_dual(ours).tangent, forward_ad.unpack_dual(exact).tangent)
            # A directional derivative of the gradient.
            gradient, expected = (torch.autograd.grad(y.square().sum(), t["B"])[0] for y in (ours, exact))
            torch.testing.assert_close(
                forward_ad.unpack_dual(gradient).tangent, forward_ad.unpack_dual(expected).tangent
            )


@jvp_imports
@both
def test_torch_func_transforms_work(way: str):
    t = {n: v.detach() for n, v in tensors(4, 5).items()}

    def loss(A: Tensor, x: Tensor, base: Tensor, f: Any = call) -> Tensor:
        return f(way, t | {"A": A, "x": x, "base": base}).square().sum()

    def by_formula(A: Tensor, x: Tensor, base: Tensor) -> Tensor:
        return loss(A, x, base, formula)

    for transformed in (
        lambda f: torch.func.grad(f)(t["A"], t["x"], t["base"]),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0, 0))(t["A"], t["x"], t["base"]),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None, None))(
            torch.stack([t["A"], -t["A"]]), t["x"], t["base"]
        ),
        lambda f: torch.func.hessian(f)(t["A"], t["x"], t["base"]),
        lambda f: torch.func.jvp(lambda A: f(A, t["x"], t["base"]), (t["A"],), (t["A"],)),
    ):
        torch.testing.assert_close(transformed(loss), transformed(by_formula))


@both
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_compiler_sees_one_graph(way: str, p: float):
    t = tensors(4, 5)
    compiled = torch.compile(lambda t: call(way, t, p), fullgraph=True, backend="aot_eager")
    y = compiled(t)
    y.sum().backward()
    if p == 0:
        torch.testing.assert_close(y, formula(way, t))
    torch._dynamo.reset()


@both
def test_a_tensor_subclass_sees_torchs_own_functions(way: str):
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    t = {n: v.detach() for n, v in tensors(4, 5).items()}
    y = call(way, t | {"x": t["x"].as_subclass(Watched)})
    assert "linear" in seen
    torch.testing.assert_close(y.as_subclass(Tensor), formula(way, t))


def test_complex_tensors_take_the_plain_way():
    x, W, A, B = (torch.randn(s, dtype=torch.complex128) for s in ((4, 5), (6, 5), (3, 5), (6, 3)))
    A.requires_grad_()
    y = fused.linear(x, W, None, A, B, SCALE)
    torch.testing.assert_close(y, x @ W.T + SCALE * x @ A.T @ B.T)
    y.abs().sum().backward()


def test_threads_do_not_disturb_each_other():
    t = tensors(64, 5)
    expected = gradients("linear", t, formula("linear", t))
    found: list[dict[str, Tensor]] = []

    def work() -> None:
        for _ in range(20):
            found.append(gradients("linear", t, call("linear", t)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for gradient in found:
        torch.testing.assert_close(gradient, expected)


def test_one_input_used_by_several_layers_gets_the_sum_of_their_gradients():
    t = tensors(4, 5)
    layers = list(itertools.repeat(t, 3))
    ours = torch.autograd.grad(sum(call("linear", one).square().sum() for one in layers), t["x"])
    exact = torch.autograd.grad(3 * formula("linear", t).square().sum(), t["x"])
    torch.testing.assert_close(ours, exact)


def test_a_backward_pass_can_be_repeated_with_its_graph_retained():
    t = tensors(4, 5)
    y = call("linear", t, 0.2).sum()
    first = torch.autograd.grad(y, [t["x"], t["A"], t["B"]], retain_graph=True)
    again = torch.autograd.grad(y, [t["x"], t["A"], t["B"]])
    assert all(one.equal(other) for one, other in zip(first, again))


def test_a_module_of_this_step_trains_as_one_of_torchs_own():
    class Layer(nn.Module):
        def __init__(self, function: Callable[..., Tensor]) -> None:
            super().__init__()
            t = tensors(4, 5, dtype=torch.float32, wants="")
            self.function, self.W, self.b = function, t["W"], t["b"]
            self.A, self.B = nn.Parameter(t["A"]), nn.Parameter(t["B"])

        def forward(self, x: Tensor) -> Tensor:
            return self.function("linear", {"x": x, "W": self.W, "b": self.b, "A": self.A, "B": self.B})

    x, losses = torch.randn(32, 5), []
    for function in (call, formula):
        layer = Layer(function)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
