"""What every adapted layer promises, over every row of tests/cases.py."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from cases import CASES, IDS, Case, randomise, reference
from rounding import Condition
from snapshot import assert_same, snapshot
from torch import Tensor

from lightning_lora.engine import (
    Adapter,
    adapter_state_dict,
    adapters,
    inject,
    load_adapter_state_dict,
    merge,
    merged,
    remove,
)

# torch's own, once in a process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:Merged, a convolution with groups"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


@every_case
@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit_of_the_output(case: Case):
    # Frozen before as well: torch's attention rounds otherwise where its weights require grad.
    model, x = case.model().eval().requires_grad_(False), case.input()
    before = model(x)
    inject(model, case.lora_config())
    assert model(x).equal(before)
    assert any(True for _ in adapters(model))


@every_case
@torch.no_grad()
def test_the_output_is_that_of_the_formula(case: Case):
    model = case.adapted()
    exact = reference(model)(case.input(torch.float64))
    torch.testing.assert_close(model.double()(case.input(torch.float64)), exact, rtol=1e-10, atol=1e-12)
    # The test would be empty if the adapters did nothing.
    assert not torch.allclose(case.model().eval().double()(case.input(torch.float64)), exact, atol=1e-3)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_merged_or_not_the_output_is_off_by_no_more_than_rounding_explains(case: Case, dtype: torch.dtype):
    model = case.adapted()
    exact = reference(model)(case.input(torch.float64))
    condition = Condition(model, case.input(torch.float64))
    model.to(dtype)
    assert condition.excess(model(case.input(dtype)), exact) <= 1
    with merged(model):
        assert condition.excess(model(case.input(dtype)), exact) <= 1
    merge(model)
    assert condition.excess(model(case.input(dtype)), exact) <= 1
    assert not list(adapters(model))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_a_merged_weight_is_rounded_once_to_its_own_dtype(case: Case, dtype: torch.dtype):
    model = case.adapted().to(dtype)
    exact = reference(model).state_dict()
    merge(model)
    assert model.state_dict().keys() == exact.keys()
    for name, weight in model.state_dict().items():
        V = exact[name]
        # Before that, in float32: B A and its norm, of a few hundred terms of W's size at most.
        bound = torch.finfo(dtype).eps / 2 * V.abs() + 16 * torch.finfo(torch.float32).eps * V.abs().max()
        assert ((weight.double() - V).abs() <= bound).all(), name


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merged_puts_everything_back_bit_for_bit(case: Case, dtype: torch.dtype):
    model = case.adapted().to(dtype)
    before = snapshot(model)
    with merged(model):
        assert not any(isinstance(m, Adapter) for m in model.modules())
        assert list(model.state_dict()) == list(case.model().state_dict())
    assert_same(snapshot(model), before)
    with pytest.raises(ZeroDivisionError), merged(model):
        raise ZeroDivisionError
    assert_same(snapshot(model), before)


def test_a_grouped_convolution_grows_when_it_is_merged_and_one_is_told_before():
    (case,) = (case for case in CASES if case.name == "conv1d-depthwise")
    model = case.adapted()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="its weight grows: layer from 8x1x3 to 8x4x3"):
            merge(model)
        with pytest.raises(UserWarning, match="its weight grows"), merged(model):
            pass
    assert_same(snapshot(model), before)
    merge(model)
    assert model.layer.groups == 1
    assert model.layer.weight.shape == (8, 4, 3)
    assert model.layer.weight.requires_grad


@every_case
def test_remove_gives_back_the_base_bit_for_bit(case: Case):
    model, x = case.model(), case.input()
    next(model.parameters()).requires_grad_(False)
    before, output = snapshot(model), model(x).detach()
    inject(model, case.lora_config())
    randomise(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    remove(model)
    assert_same(snapshot(model), before)
    assert model(x).equal(output)


@every_case
@torch.no_grad()
def test_a_saved_adapter_loads_to_the_same_output(case: Case):
    model, other = case.adapted(), case.model().eval()
    inject(other, case.lora_config())
    file = io.BytesIO()
    torch.save(adapter_state_dict(model), file)
    file.seek(0)
    load_adapter_state_dict(other, torch.load(file))
    assert other(case.input()).equal(model(case.input()))


@every_case
@torch.no_grad()
def test_a_whole_model_can_be_pickled_and_then_removed(case: Case):
    model = case.adapted()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert loaded(case.input()).equal(model(case.input()))
    remove(loaded)
    assert loaded(case.input()).equal(case.model().eval()(case.input()))


@every_case
@torch.no_grad()
def test_a_deep_copy_has_weights_of_its_own(case: Case):
    model = case.adapted()
    before, output = snapshot(model), model(case.input())
    twin = copy.deepcopy(model)
    assert twin(case.input()).equal(output)
    for p in twin.parameters():
        p.add_(1)
    remove(twin)
    assert_same(snapshot(model), before)
    assert model(case.input()).equal(output)


@every_case
@torch.no_grad()
def test_a_base_checkpoint_loads_strictly_before_and_after_injection(case: Case):
    checkpoint = {name: torch.randn_like(t) for name, t in case.model().state_dict().items()}
    early, late = case.model(), case.model()
    early.load_state_dict(checkpoint)
    inject(early, case.lora_config())
    inject(late, case.lora_config())
    late.load_state_dict(checkpoint)
    assert early.eval()(case.input()).equal(late.eval()(case.input()))
    with pytest.raises(RuntimeError, match="Missing key"):
        late.load_state_dict(dict(list(checkpoint.items())[1:]))
    late.load_state_dict(early.state_dict())
    incomplete = {name: t for name, t in early.state_dict().items() if "lora_B" not in name}
    with pytest.raises(RuntimeError, match="lora_B"):
        late.load_state_dict(incomplete)


@every_case
@pytest.mark.slow
def test_a_compiled_model_computes_the_same_without_a_graph_break(case: Case):
    model = case.adapted()
    expected = model(case.input())
    # By default dynamo leaves recurrent layers alone, whosever they are.
    with torch._dynamo.config.patch(allow_rnn=True):
        output = torch.compile(model, fullgraph=True, backend="eager")(case.input())
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=lambda case: case.name)
def test_gradients_are_those_of_finite_differences(case: Case):
    model, x = case.adapted().double(), case.input(torch.float64)
    if not x.is_floating_point():
        x = x.clamp(min=1)  # by torch's definition a padding_idx gets no gradient, though the output depends on it
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]

    def output(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors)), (x,))

    assert torch.autograd.gradcheck(output, values, fast_mode=True)
