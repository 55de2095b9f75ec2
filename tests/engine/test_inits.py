"""How adapters start: against closed forms, and PEFT's own initialisers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.corda import collect_eigens_for_layer
from rounding import Rounded, assert_rounded
from snapshot import assert_same, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapters,
    inject,
    remove,
)
from lightning_lora.engine.layers import pairs
from lightning_lora.errors import ConfigError, DataError, TargetError

D_IN, D_OUT, RANK = 12, 9, 4
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "transformers-conv1d": lambda: Conv1D(D_OUT, D_IN),
    "conv2d": lambda: nn.Conv2d(3, D_OUT, 2),
    "embedding": lambda: nn.Embedding(D_IN, D_OUT),
}


def model(kind: str = "linear", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(LAYERS[kind]())
    with torch.no_grad():
        net[0].weight.normal_()
    return net


def matrix(net: nn.Module, kind: str) -> Tensor:
    """The weight of the layer as (out, in)."""
    W = net[0].weight.detach()
    return W.T if kind in ("transformers-conv1d", "embedding") else W.flatten(1)


def input_of(kind: str) -> Tensor:
    if kind == "embedding":
        return torch.randint(0, D_IN, (7,))
    return torch.randn((2, 3, 5, 5) if kind == "conv2d" else (7, D_IN))


def started(net: nn.Module, name: str, measured: Any = None, **fields: Any) -> tuple[Tensor, Tensor, float]:
    """A and B as matrices, and the scale."""
    config = LoRAConfig(**{"rank": RANK, "alpha": 6, "target_modules": ["0"], "init": name, **fields})
    inject(net, config, measured=measured)
    layer: Any = net[0]
    return layer.lora_A.detach().flatten(1), layer.lora_B.detach().flatten(1), layer.lora.scale


def truncated(M: Tensor, which: slice) -> Tensor:
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return ((U[:, which] * S[which]) @ Vh[which]).float()


def assert_truncated(found: Tensor, M: Tensor, rank: int, of: Tensor | float = 0.0) -> None:
    """`found` is `of` + the best approximation of M of that rank, but for what an SVD in float32 loses.

    An SVD is exact for some M + E with |E| of about eps |M|, times the number of rows and columns for safety; E turns
    the singular directions by |E| / gap, the gap being that between the last value taken and the first left out (Wedin
    1972), and so moves the approximation by |E| (1 + |M| / gap).
    """
    S = torch.linalg.svdvals(M.detach().double())
    gap = float(S[rank - 1] - (S[rank] if len(S) > rank else 0.0))
    E = sum(M.shape) * torch.finfo(torch.float32).eps * float(S[0])
    assert float((found - of - truncated(M, slice(rank))).detach().norm()) <= E * (1 + float(S[0]) / gap)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["pissa", "pissa_fast"])
def test_pissa_starts_as_the_best_approximation_of_the_weight(name: str, kind: str):
    net = model(kind)
    A, B, scale = started(net, name)
    assert_truncated(scale * B @ A, matrix(net, kind), RANK)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-4)


def test_the_fast_svd_is_all_but_as_good_where_the_weight_is_large():
    torch.manual_seed(0)
    W = torch.randn(200, 300) * torch.logspace(0, -2, 300)
    net = nn.Sequential(nn.Linear(300, 200))
    net[0].weight.data.copy_(W)
    A, B, scale = started(net, "pissa_fast")
    best = (W - truncated(W, slice(RANK))).norm()
    assert (W - scale * B @ A).norm() <= 1.001 * best


@pytest.mark.parametrize("kind", LAYERS)
def test_olora_starts_as_the_first_ranks_of_the_qr_decomposition(kind: str):
    net = model(kind)
    A, B, _ = started(net, "olora")
    W = matrix(net, kind)
    torch.testing.assert_close(B.T @ B, torch.eye(RANK))
    # What is left of W is orthogonal to B, and its first columns are gone.
    torch.testing.assert_close(B.T @ (W - B @ A), torch.zeros(RANK, W.shape[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close((W - B @ A)[:, :RANK], torch.zeros(W.shape[0], RANK), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_orthogonal_factors_are_not_zero_and_their_product_is(kind: str):
    net, x = model(kind), input_of(kind)
    before = net(x)
    A, B, _ = started(net, "orthogonal")
    assert float(A.abs().mean()) > 0.01
    assert float(B.abs().mean()) > 0.01
    # Zero but for the rounding of Q and of the products, each of a few units in the last place of its terms.
    eps = torch.finfo(torch.float32).eps
    assert bool(((B @ A).abs() <= 8 * RANK * eps * (B.abs() @ A.abs())).all())
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    assert set(adapter_state_dict(net)) == {"0.lora_A", "0.lora_B"}


@pytest.mark.parametrize("fields", [{"rank": 3}, {"rank_pattern": {"0": 5}}])
def test_orthogonal_needs_an_even_rank(fields: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"'orthogonal' needs ranks that are multiples of 2, not [35]"):
        LoRAConfig(**{"init": "orthogonal", **fields})


@pytest.mark.parametrize("ours", ["orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_training_goes_step_by_step_as_in_peft_which_changes_the_base(ours: str, kind: Any):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D_IN, D_OUT), nn.Tanh(), nn.Linear(D_OUT, 5))
    config = LoRAConfig(rank=RANK, alpha=6, target_modules=["0", "2"], init=ours)
    theirs: Any = get_peft_model(
        copy.deepcopy(net),
        LoraConfig(r=RANK, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=ours),  # type: ignore[arg-type]
    )
    base = snapshot(net)
    inject(net, config)
    for name, module in adapters(net):
        peft_layer = theirs.base_model.model.get_submodule(name)
        for factor in "AB":
            own, other = getattr(module, f"lora_{factor}"), getattr(peft_layer, f"lora_{factor}")["default"].weight
            if ours == "orthogonal":
                own.data.copy_(other)  # drawn
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    net.double(), theirs.double()  # so that only the starts are rounded
    x, target = torch.randn(20, D_IN, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)

    def losses(net: nn.Module) -> list[float]:
        optimizer = kind([p for p in net.parameters() if p.requires_grad], lr=0.02)
        found = []
        for _ in range(10):
            loss = nn.functional.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    # PEFT rounds W - s B A, which we keep apart: by some 1e-7 of it, that ten steps make larger.
    assert losses(net) == pytest.approx(losses(theirs), rel=5e-5)
    remove(net.float())
    assert_same(snapshot(net), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["pissa", "pissa_fast", "olora"])
@torch.no_grad()
def test_a_start_that_is_left_out_changes_no_bit_in_any_precision(name: str, kind: str, dtype: torch.dtype):
    net, x = model(kind).to(dtype), input_of(kind)
    x = x.to(dtype) if x.is_floating_point() else x
    before = net(x)
    started(net, name)
    assert net(x).equal(before)
    layer: Any = net[0]
    assert layer.lora_A.dtype == layer.lora_A0.dtype == torch.promote_types(dtype, torch.float32)
    net.to(torch.bfloat16)
    x = x.bfloat16() if x.is_floating_point() else x
    plain = model(kind).bfloat16()
    plain.load_state_dict(net.state_dict(), strict=False)
    assert net(x).equal(plain(x))


@pytest.mark.parametrize("name", ["pissa", "pissa_fast", "olora"])
@pytest.mark.parametrize("kind", ["experts", "experts-transposed", "lstm", "attention-packed", "bilinear", "GRUCell"])
def test_each_matrix_of_parameters_and_stacks_starts_by_itself(name: str, kind: str):
    (case,) = (case for case in CASES if case.name == kind)
    net, x = case.model().eval(), case.input()
    bare, before = snapshot(net), net(x)
    inject(net, replace(case.lora_config(), init=name))
    assert net(x).equal(before)
    for pair in pairs(net):
        A, B = (
            factor[..., : pair.spec.rank, :] if which == "A" else factor[..., -pair.spec.rank :]
            for which, factor in zip("AB", pair.module.factors(pair.parameter))
        )  # of [A; A - A0] and [B - B0, B0]
        P = pair.module.dense_weight(pair.parameter).detach()
        for W, a, b in zip(*(t if t.dim() == 3 else t[None] for t in (pair.module.matrix(pair.module, P), A, B))):
            found = (pair.spec.scale if name != "olora" else 1) * (b @ a).detach()
            if name == "olora":  # the first columns of W, exactly
                torch.testing.assert_close(found[:, : pair.spec.rank], W[:, : pair.spec.rank], rtol=1e-4, atol=1e-5)
            else:
                assert_truncated(found, W, pair.spec.rank)
    net(x).square().mean().backward()
    assert all(pair.B.grad is not None and pair.B.grad.any() for pair in pairs(net))
    remove(net)
    assert_same(snapshot(net), bare)


@torch.no_grad()
def test_a_small_change_beside_a_large_start_is_kept_in_half_precision():
    net, x = model(), torch.randn(7, D_IN)
    started(net, "pissa")
    net[0].lora_B.add_(1e-4)  # less than bfloat16 can tell from B itself
    layer: Any = net[0]
    A, change = Rounded.of(layer.lora_A, torch.bfloat16), Rounded.of(layer.lora_B - layer.lora_B0, torch.bfloat16)
    assert float(change.exact.abs().min()) > 0
    net.bfloat16()
    # (B - B0) A x: of B A x and B0 A x apart, bfloat16 would leave nothing of their difference.
    assert_rounded(layer.update(x.bfloat16()), (Rounded.of(x, torch.bfloat16) @ A.T) @ change.T)


@torch.no_grad()
def test_eva_reads_the_directions_in_which_the_inputs_vary_most():
    X = torch.randn(200, D_IN) * torch.linspace(3, 0.1, D_IN)
    A, B, _ = started(model(), "eva", {"0": {"C": X.T @ X / 200}})
    _, _, Vh = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close((A @ Vh[:RANK].T).abs(), torch.eye(RANK), rtol=0, atol=1e-3)
    assert not B.any()


def covariance() -> Tensor:
    X = torch.randn(60, D_IN) * torch.linspace(2, 0.2, D_IN)
    return X.T @ X / 60


@pytest.mark.parametrize("kind", ["linear", "transformers-conv1d"])
@pytest.mark.parametrize(("name", "method"), [("corda", "ipm"), ("corda_preserving", "kpm")])
@torch.no_grad()
def test_corda_starts_as_in_peft(name: str, method: str, kind: str):
    net, C = model(kind), covariance()
    peft_layer = copy.deepcopy(net[0])
    peft_layer.covariance_matrix = C  # type: ignore[assignment]
    eigens = collect_eigens_for_layer(peft_layer, SimpleNamespace())  # type: ignore[arg-type]
    which = slice(RANK) if method == "ipm" else slice(-RANK, None)
    A, B, scale = started(net, name, {"0": {"C": C}})
    product = (eigens.U_WC[:, which] * eigens.S_WC[which]) @ eigens.V_WC[:, which].T
    torch.testing.assert_close(scale * B @ A, product, rtol=1e-3, atol=1e-4)
    # The values are shared evenly, in the order in which they are taken.
    S = eigens.S_WC[which] if method == "ipm" else eigens.S_WC[which].flip(0)
    torch.testing.assert_close(B.T @ B, torch.diag(S / scale), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_corda_takes_inputs_that_span_less_than_the_layer_reads():
    x = torch.randn(1, D_IN)
    A, B, _ = started(model(), "corda", {"0": {"C": x.T @ x}})
    assert bool(A.isfinite().all())
    assert bool(B.isfinite().all())
    A, _, _ = started(model(), "corda", {"0": {"C": torch.zeros(D_IN, D_IN)}})
    assert bool(A.isfinite().all())


def test_the_first_step_of_lora_ga_is_that_of_full_fine_tuning_as_far_as_its_rank_allows():
    net, x, target = model(), torch.randn(30, D_IN, dtype=torch.float64), torch.randn(30, D_OUT, dtype=torch.float64)
    net.double()
    loss = nn.functional.mse_loss(net(x), target)
    (G,) = torch.autograd.grad(loss, [net[0].weight])
    started(net, "lora_ga", {"0": {"G": G.float()}})
    layer: Any = net[0]
    nn.functional.mse_loss(net(x), target).backward()
    lr, before = 1e-7, layer.delta_weight().detach()
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p -= lr * p.grad
    step = (layer.delta_weight().detach() - before) / -lr
    size = layer.lora.scale * D_OUT**0.25 / math.sqrt(16)
    torch.testing.assert_close(step, size**2 * truncated(G, slice(2 * RANK)).double(), rtol=1e-4, atol=1e-5)


def test_loftq_starts_as_the_best_approximation_of_what_quantization_took():
    net, E = model(), torch.randn(D_OUT, D_IN)
    W = net[0].weight.detach().clone()
    A, B, scale = started(net, "loftq", {"0": {"E": E}})
    assert_truncated(scale * B @ A, E, RANK)
    layer: Any = net[0]
    assert_truncated(layer.adapted_weight(), E, RANK, of=W)
    assert set(adapter_state_dict(net)) == {"0.lora_A", "0.lora_B"}


# What an initialiser asks for, and where it has no meaning.


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("eva", r"the inputs of each layer.*calibrate\(model, config, step, batches\)"),
        ("lora_ga", r"the gradients of each weight.*calibrate\("),
        ("loftq", r"the quantization errors of each weight.*residuals\("),
    ],
)
def test_an_initialiser_that_needs_data_says_so_and_how_to_give_it(name: str, how: str):
    net = model()
    before = snapshot(net)
    with pytest.raises(ConfigError, match=f"init='{name}' starts from {how}"):
        started(net, name)
    assert_same(snapshot(net), before)


@pytest.mark.parametrize("name", ["eva", "corda"])
def test_what_was_measured_and_is_not_finite_is_refused_by_the_layers_name(name: str):
    net = model()
    before = snapshot(net)
    with pytest.raises(DataError, match="measured at 0 is not finite"):
        started(net, name, {"0": {"C": torch.full((D_IN, D_IN), torch.nan)}})
    assert_same(snapshot(net), before)


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal", "eva", "lora_ga"])
def test_a_grouped_convolution_has_no_matrix_to_start_from(name: str):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    before = snapshot(net)
    with pytest.raises(TargetError, match=r"'0' \(Conv2d\).*groups=2.*exclude_modules"):
        started(net, name)
    assert_same(snapshot(net), before)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_an_embedding_has_no_inputs_to_measure(name: str):
    with pytest.raises(TargetError, match="an embedding looks up indices"):
        started(model("embedding"), name)


def test_ranks_that_the_weight_does_not_have_start_as_kaimings():
    net = model()
    with pytest.warns(UserWarning, match="legal but wasteful"):
        A, B, _ = started(net, "pissa", rank=11, alpha=11)
    torch.testing.assert_close(B @ A, net[0].weight.detach(), rtol=1e-4, atol=1e-4)
    assert not B[:, D_OUT:].any()
    assert bool((A[D_OUT:].abs().amax(1) > 0.1 / math.sqrt(D_IN)).all())
