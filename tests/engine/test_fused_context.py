"""The fused step in narrow precision, and under all that torch does to a computation."""

from __future__ import annotations

import functools
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_lora.engine import fused
from tests.engine.fused_step import (
    SCALE,
    USES,
    both,
    call,
    every_rate,
    formula,
    gradients,
    jvp_imports,
    kept_by,
    ramp,
    rounded,
    saved_by,
    tensors,
)

# Precision.


def assert_narrow(way: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int = 3) -> None:
    """Output and gradients, where all is in `dtype` but A and B are masters in float32."""
    wide = tensors(*shape, rank=rank)
    given = {n: t.detach().to(torch.float32 if n in "AB" else dtype).requires_grad_(n != "W") for n, t in wide.items()}
    y = call(way, given)
    found = gradients(way, given, y)
    expected = rounded(way, given, dtype, ramp(y))
    assert_rounded(y, expected["y"], "the output")
    for name, gradient in found.items():
        assert gradient.dtype == given[name].dtype
        assert_rounded(gradient, expected[name], f"the gradient of {name}")


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (4, 40, 96)], ids=str)
def test_half_precision_loses_no_more_than_rounding_each_product_explains(way, dtype, shape):
    assert_narrow(way, shape, dtype)


@pytest.mark.parametrize("seed", range(8))
def test_half_precision_loses_no_more_at_any_shape(seed: int):
    generator = random.Random(seed)
    shape = (generator.randint(32, 300), generator.randint(16, 300))
    assert_narrow("linear", shape, torch.bfloat16, rank=generator.choice([1, 3, 8, 64]))


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
    expected = rounded(way, t, torch.bfloat16, ramp(y), kept)
    assert_rounded(y, expected["y"], "the output")
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert_rounded(gradient, expected[name], f"the gradient of {name}")


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


@both
@every_rate
def test_what_selective_checkpointing_keeps_is_not_changed_afterwards(way: str, p: float):
    """A policy that keeps the results of matrix products, which is the usual one."""
    t, aten = tensors(4, 5), torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default]

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    names = list(t)

    def function(*given: Tensor) -> Tensor:
        return call(way, dict(zip(names, given)), p)

    torch.manual_seed(0)
    y = checkpoint(function, *t.values(), use_reentrant=False, context_fn=contexts)
    found = gradients(way, t, y)
    torch.manual_seed(0)
    torch.testing.assert_close(found, gradients(way, t, formula(way, t, F.dropout(torch.ones_like(t["x"]), p))))


@both
@every_rate
def test_many_gradients_at_once_are_those_one_by_one(way: str, p: float):
    t = tensors(4, 5)
    used = [t[n] for n in USES[way]]
    y = call(way, t, p)
    several = torch.randn(3, *y.shape, dtype=y.dtype)
    at_once = torch.autograd.grad(y, used, several, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(y, used, g, retain_graph=True) for g in several))
    torch.testing.assert_close(list(at_once), [torch.stack(each) for each in one_by_one])


@jvp_imports
@both
def test_forward_mode_differentiation_agrees_with_the_formula(way: str):
    t = tensors(4, 5)
    for name in USES[way]:
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


def test_a_traced_computation_draws_anew_in_each_run():
    t = {n: v.detach() for n, v in tensors(40, 5).items()}
    traced = make_fx(lambda x: call("linear", t | {"x": x}, 0.5))(t["x"])
    assert not traced(t["x"]).equal(traced(t["x"]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@both
def test_layouts_without_strides_take_the_plain_way(way: str):
    t = {n: v.detach() for n, v in tensors(4, 5).items()}
    expected = formula(way, t)
    for layout in (torch.sparse_coo, torch.sparse_csr):
        torch.testing.assert_close(call(way, t | {"x": t["x"].to_sparse(layout=layout)}), expected)
    nested = {n: torch.nested.nested_tensor(list(t[n].split((1, 3)))) for n in ("x", "base")}
    torch.testing.assert_close(torch.cat(call(way, t | nested).unbind()), expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_an_input_of_another_dtype_than_the_weight_is_an_error_as_without_an_adapter(dtypes: tuple[torch.dtype, ...]):
    t = tensors(4, 5, wants="A B")
    t = t | {n: t[n].to(dtype) for n, dtype in zip(("x", "W"), dtypes)} | {"b": t["b"].to(dtypes[1])}
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        call("linear", t)
    with torch.autocast("cpu", torch.bfloat16):
        assert call("linear", t).dtype == torch.bfloat16


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


@both
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 3, 4, 5)], ids=str)
def test_what_comes_next_may_change_the_output_in_place(way: str, shape: tuple[int, ...], biased: bool):
    t = tensors(*shape)
    y = fused.linear(t["x"], t["W"], None, t["A"], t["B"], SCALE) if not biased and way == "linear" else call(way, t)
    exact = formula(way, t if biased or way != "linear" else t | {"b": torch.zeros(6, dtype=torch.float64)})
    ours, theirs = (torch.autograd.grad(out.relu_().square().sum(), t["A"]) for out in (y, exact.clone()))
    torch.testing.assert_close(ours, theirs)
    fused.dropout(t["x"], 0.2).relu_().sum().backward()


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
