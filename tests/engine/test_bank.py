"""Every row of a bank's batch gets what the single adapter alone gives, over every layer of tests/cases.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from cases import CASES, Case
from rounding import Rounded, assert_rounded
from torch import Tensor, nn

from lightning_lora.engine import adapters, inject
from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.errors import AdapterStateError, TargetError
from tests.engine.bank_models import MOST, close_to, factors_of, served, small

# What is trained whole, layers whose weights are read without calling them, and kinds that a bank does not serve.
REFUSED = (
    *("linear-bias", "linear-modules-to-save", "multihead-attention", "transformer-", "attention", "linear-parameter"),
    *("experts", "lstm", "gru", "rnn", "LSTM", "GRU", "RNN", "bilinear", "conv-transpose", "embedding-bag", "own"),
)
_GROUPED = ("conv2d-groups", "conv1d-depthwise")
SERVED = [case for case in CASES if not case.name.startswith(REFUSED)]
# Of the others, those that no bank can be made for; for the rest it is the adapter that does not fit.
UNSERVED = [
    case
    for case in CASES
    if case.name.startswith(REFUSED) and not case.name.startswith("linear-") and "target_parameters" not in case.config
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def variants(case: Case, count: int) -> dict[str, nn.Module]:
    """Models of the case with adapters of their own; every other one is one rank lower where the layer allows it."""
    models = {}
    for i in range(count):
        model = case.model()
        inject(model, case.lora_config())
        generator = torch.Generator().manual_seed(i)
        for _, module in adapters(model):
            for tensor in ("lora_A", "lora_B", "lora_B_bias"):
                factor = getattr(module, tensor, torch.empty(0))
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3)
        models[f"a{i}"] = model.eval()
    return models


def bank_of(model: nn.Module, case: Case, capacity: int = 8, **settings: object) -> Bank:
    config = case.lora_config()
    return Bank(model.eval(), capacity, max_rank=MOST, target_modules=config.target_modules, **settings)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_one_adapter_for_all_rows_gives_what_it_gives_alone(case: Case):
    models = variants(case, 3)
    base, x = case.model(), case.input()
    plain = base.eval()(x)
    bank = bank_of(base, case)
    for name, model in models.items():
        bank.put(name, factors_of(model))
    for name, model in models.items():
        with bank.use(name):
            assert close_to(base(x), model(x))
            assert not torch.allclose(base(x), plain, atol=1e-3)
    assert base(x).equal(plain)
    with bank.use(None):
        assert base(x).equal(plain)


LAYOUTS = {
    "each once": (1, {}),
    "repeated": (2, {"layout": "repeated"}),
    "tiled": (3, {"layout": "tiled"}),
    "indexed": (1, {"rows": "any order"}),
}


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_every_row_gets_its_own_adapter_however_the_rows_are_laid(case: Case, how: str):
    models = variants(case, 4)
    base = case.model().eval()
    x = torch.cat([case.input(), case.input().flip(0)])  # more rows than the smallest case has
    names: list[str | None] = [("a2", None, "a0", "a3", "a0")[i % 5] for i in range(len(x))]
    times, said = LAYOUTS[how]
    rows = torch.arange(len(x))
    rows = rows.repeat_interleave(times) if how == "repeated" else rows.repeat(times)
    if how == "indexed":
        rows = torch.tensor([3, 1, 1, 2, 3, 0, 1]) % len(x)  # unequally many of each row
        names, said = names[:4], {"rows": rows}
    x = x[rows]
    alone = [(base if names[row] is None else models[names[row]]) for row in rows.tolist()]
    exact = torch.cat([model(row[None]) for model, row in zip(alone, x)])
    bank = bank_of(base, case)
    for name, model in models.items():
        bank.put(name, factors_of(model))
    with bank.use(names, **said):
        assert close_to(base(x), exact)
    if how in ("repeated", "tiled"):
        with bank.use(names), pytest.raises(AdapterStateError, match=r"'layer(\.\w+)*' got an input of shape"):
            base(x)


@pytest.mark.parametrize("case", UNSERVED, ids=lambda case: case.name)
def test_a_layer_that_a_bank_cannot_serve_is_refused_by_name_and_nothing_is_changed(case: Case):
    model = case.model()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=r"'layer(\.\w+)*'"):
        Bank(model, target_modules=case.lora_config().target_modules)
    assert [type(module) for module in model.modules()] == classes


def updated(x: Rounded, A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Rounded:
    """scale * B A x: with a bank's s B, which is rounded, or scaled afterwards."""
    return ((x @ Rounded.of(A, dtype).T) @ (Rounded.of(B, dtype) * scale).T).stored()


def by_formula(base: nn.Module, factors: Mapping[str, LayerFactors], row: Tensor, dtype: torch.dtype) -> Rounded:
    """What `small`'s base gives with these factors, by the formula."""
    h = Rounded.of(row, dtype)
    for layer, module in base.named_children():
        W, *b = (Rounded.of(p, dtype) for p in module.parameters())
        y = h @ W.T + b[0] if b else h @ W.T
        values = factors.get(layer)
        if values is not None:
            y = y + updated(h, values.A, values.B, values.scale, dtype)
        h = y.tanh() if layer == "first" else y
    return h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bank_on_a_half_precision_base_computes_as_exactly_as_the_single_adapter(dtype: torch.dtype):
    base, factors, _ = small(4)
    base.to(dtype)
    x, names = torch.randn(4, 64, 6).to(dtype), ["a3", "a1", "a0", "a2"]
    bank = served(base, 4, MOST)
    assert bank.plan.dtype is dtype
    for name, part in factors.items():
        bank.put(name, part)
    with bank.use(names):
        output = base(x)
    assert output.dtype is dtype
    for name, row, found in zip(names, x, output):
        assert_rounded(found, by_formula(base, factors[name], row, dtype), f"the row of {name}")


@pytest.mark.parametrize("positions", [(1,), (2,), (3,), (4,), (15,), (16,), (40,), (5, 7)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_positions_gets_the_closed_form(dtype: torch.dtype, rows: int, positions: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5, bias=False)).to(dtype).eval()
    W = Rounded.of(layer[0].weight, dtype)
    bank = Bank(layer, 4, max_rank=3)
    factors = {}
    for i in range(3):
        A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 6), (5, 3)))
        factors[f"a{i}"] = A, B, 0.5
        bank.put(f"a{i}", {"0": LayerFactors(A, B, 0.5)})
    x = torch.randn(rows, *positions, 6, generator=generator).to(dtype)

    def check(names: list[str]) -> None:
        for name, row, found in zip(names, x.flatten(1, -2), layer(x).flatten(1, -2), strict=True):
            h = Rounded.of(row, dtype)
            assert_rounded(found, h @ W.T + updated(h, *factors[name], dtype), f"the row of {name}")

    with bank.use("a1"):
        check(["a1"] * rows)
    with bank.use([f"a{i}" for i in range(rows)]):
        check([f"a{i}" for i in range(rows)])


def test_autocast_is_followed():
    base, factors, _ = small(3)
    bank = served(base, 3, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    for names in (["a1"] * 3, ["a0", "a1", "a2"]):
        with bank.use("a1" if names == ["a1"] * 3 else names), torch.autocast("cpu", torch.bfloat16):
            output = base(x)
        assert output.dtype is torch.bfloat16
        for name, row, found in zip(names, x, output):
            assert_rounded(
                found[None], by_formula(base, factors[name], row[None], torch.bfloat16), f"the row of {name}"
            )


@pytest.mark.parametrize("case", [c for c in SERVED if not c.name.startswith(_GROUPED)], ids=lambda case: case.name)
def test_a_folded_weight_gives_what_the_adapter_gives(case: Case):
    (model,) = variants(case, 1).values()
    base, x = case.model(), case.input()
    plain = base.eval()(x)
    bank = bank_of(base, case)
    bank.put("a", factors_of(model))
    if case.name == "linear-subclass":  # known to be one only by trying
        with pytest.raises(AdapterStateError, match="forward of its own"), bank.folded("a"):
            pass
    elif not case.name.startswith("embedding-scaled"):
        with bank.folded("a"):
            assert close_to(base(x), model(x))
    assert base(x).equal(plain)


def test_rows_of_an_expert_are_refused():
    model = nn.Sequential()
    model.add_module("experts", nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    bank = Bank(model, target_modules=["0", "1"])
    bank.put("a", {"experts.0": LayerFactors(torch.randn(1, 4), torch.randn(4, 1), 1.0)})
    expert, x = model.experts[0], torch.randn(2, 4)
    plain = expert(x)
    with bank.use("a"):
        assert not torch.allclose(expert(x), plain)
    with bank.use(["a", None]), pytest.raises(AdapterStateError, match=r"'experts\.0' is one of several experts"):
        expert(x)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_once_it_serves_every_routing():
    base, factors, alone = small(3)
    bank = served(base, 3, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6)
    plain = compiled(x)
    for name in ("a0", "a2"):
        with bank.use(name):
            assert close_to(compiled(x), alone[name](x))
    with bank.use(["a2", None, "a1"]):
        assert close_to(compiled(x), torch.stack([alone["a2"](x)[0], plain[1], alone["a1"](x)[2]]))
    assert compiled(x).equal(plain)
    torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no word for it")
def test_the_updates_of_a_bank_are_left_out_of_cuda_graphs_which_would_replay_one_routing():
    assert torch.Tag.cudagraph_unsafe in torch.ops.lightning_lora.banked.default.tags


def test_what_was_kept_in_inference_mode_serves_where_gradients_are_needed():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    for names in ("a1", ["a1", "a1"]):
        with bank.use(names):
            with torch.inference_mode():
                base(torch.ones(2, 6))
            with torch.enable_grad():
                x = torch.ones(2, 6, requires_grad=True)
                y = base(x)
                y.sum().backward()
        assert close_to(y, alone["a1"](x))


def test_gradients_pass_through_to_what_comes_before():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    with torch.enable_grad():
        x = torch.randn(2, 6, requires_grad=True)
        exact = torch.autograd.grad(sum(alone[f"a{i}"](x[i]).square().sum() for i in range(2)), x)[0]
        with bank.use(["a0", "a1"]):
            found = torch.autograd.grad(base(x).square().sum(), x)[0]
    assert close_to(found, exact)


def test_rows_of_a_sequence_first_layer_are_refused(monkeypatch: pytest.MonkeyPatch):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for batch_first in (True, False):
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first).eval()
            bank = Bank(layer, target_modules=["linear1", "linear2"])
            bank.put("a", {"linear1": LayerFactors(torch.randn(1, 8), torch.randn(12, 1), 1.0)})
            x = torch.randn(2, 2, 8)
            plain = layer(x)
            with bank.use("a"):
                adapted = layer(x)
                assert not torch.allclose(adapted, plain)
            if batch_first:
                with bank.use(["a", None]):
                    torch.testing.assert_close(layer(x), torch.stack([adapted[0], plain[1]]))
            else:
                with bank.use(["a", None]), pytest.raises(AdapterStateError, match="batch_first"):
                    layer(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
