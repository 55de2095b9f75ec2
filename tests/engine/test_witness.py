"""A base is described from memory while it is what it was, and read again after whatever changes it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomise
from torch import nn

from lightning_lora.engine import LoRAConfig, base_fingerprint, inject, merge, merged, remove, state
from lightning_lora.engine.state import describe_base
from lightning_lora.engine.witness import witness_of

CONFIG = LoRAConfig(rank=2, target_modules=["a"])


def net() -> Any:
    torch.manual_seed(0)
    layers = OrderedDict(
        words=nn.Embedding(100, 32), a=nn.Linear(32, 80), conv=nn.Conv2d(8, 8, 3), out=nn.Linear(80, 2)
    )
    return nn.Sequential(layers)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models of which the whole base was read."""
    read: list[nn.Module] = []
    fingerprint = state._fingerprint

    def noted(model: nn.Module, base: Any) -> str:
        read.append(model)
        return fingerprint(model, base)

    monkeypatch.setattr(state, "_fingerprint", noted)
    return read


def test_a_base_is_read_once_whatever_becomes_of_its_adapters(readings):
    model = net()
    first = describe_base(model)
    for init in ("kaiming", "pissa"):
        inject(model, LoRAConfig(rank=2, target_modules=["a"], use_dora=True, init=init))
        randomise(model)
        with merged(model):
            pass
        model.train().requires_grad_(False)
        assert describe_base(model) == first
        remove(model)
    assert describe_base(model) == first
    first["base_fingerprint"] = "the caller's own"
    assert describe_base(model) != first
    assert readings == [model]


def test_what_is_trained_whole_is_no_part_of_the_base(readings):
    model = net()
    inject(model, LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["out"]))
    first = describe_base(model)
    with torch.no_grad():
        model.out.weight.add_(1)
    assert describe_base(model) == first
    assert readings == [model]
    remove(model)
    assert describe_base(model) != first  # now it is


@torch.no_grad()
def _step(model: Any) -> None:
    model.a.weight.grad = torch.ones_like(model.a.weight)
    torch.optim.SGD([model.a.weight], lr=1e-3).step()


def _load(assign: bool) -> Callable[[Any], Any]:
    return lambda model: model.load_state_dict({k: t + 1 for k, t in model.state_dict().items()}, assign=assign)


def _merge(model: Any) -> None:
    inject(model, CONFIG)
    randomise(model)
    merge(model)


def _materialise(model: Any) -> None:
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)


def _swap(model: Any) -> None:
    torch.utils.swap_tensors(model.a.weight, nn.Parameter(model.a.weight.detach() + 1))


@torch.no_grad()
def _set(model: Any) -> None:
    model.a.weight.set_(model.a.weight + 1)


def _numpy(model: Any) -> Any:
    return model.a.weight.detach().numpy()


# Through torch, a single number is seen; past its versions, whatever reaches over a row or a column.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number in place": lambda m: m.a.weight.detach()[3, 5].add_(1),
    "a bias": lambda m: m.a.bias.detach()[7].add_(1),
    "copy_": lambda m: m.a.weight.detach().copy_(m.a.weight + 1),
    "a view": lambda m: m.a.weight.detach().t()[4, :1].zero_(),
    "set_": _set,
    "an optimizer": _step,
    "load_state_dict": _load(assign=False),
    "load_state_dict, assigned": _load(assign=True),
    "merge": _merge,
    "to(float64) and a number": lambda m: (m.double(), m.a.weight.detach()[0, 1].add_(1)),
    "to_empty": _materialise,
    "another parameter": lambda m: setattr(m.a, "weight", nn.Parameter(m.a.weight.detach() + 1)),
    "another layer": lambda m: setattr(m, "a", nn.Linear(32, 80)),
    "a layer more": lambda m: m.append(nn.Linear(2, 2)),
    "a layer less": lambda m: m.pop(3),
    "another name": lambda m: setattr(m, "b", m.__delattr__("out") or nn.Linear(80, 2)),
    "swap_tensors": _swap,
    ".data": lambda m: setattr(m.a.weight, "data", m.a.weight.data + 1),
    ".data, the same memory": lambda m: m.a.weight.data.mul_(1.001),
    ".data, a row": lambda m: m.words.weight.data[17].zero_(),
    ".data, the last row": lambda m: m.words.weight.data[-1].zero_(),
    ".data, a column": lambda m: m.a.weight.data[:, 31].zero_(),
    ".data, a channel": lambda m: m.conv.weight.data[5].zero_(),
    ".data, a bias": lambda m: m.a.bias.data[7].add_(1),
    "numpy": lambda m: _numpy(m).fill(2.0),
    "numpy, a row": lambda m: _numpy(m)[40].fill(2.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_base_that_was_changed_is_read_again(change: str, layout: str):
    model = net()
    if layout == "columns":
        model.a.weight = nn.Parameter(model.a.weight.detach().t().contiguous().t())
        model.conv.to(memory_format=torch.channels_last)
    before = describe_base(model)
    CHANGES[change](model)
    after = describe_base(model)
    assert after["base_fingerprint"] == base_fingerprint(model)
    assert after != before


def test_each_row_and_each_column_is_looked_at():
    for shape in ((100, 7), (64, 64), (1000, 33), (7, 1), (5,), (3, 100), (9, 4, 3, 3), (70, 2, 2)):
        weight = nn.Parameter(torch.zeros(shape))
        before = witness_of([("weight", weight)])
        rows = weight.data.flatten(1) if weight.dim() > 1 else weight.data[:, None]
        columns = rows.T if len(rows) >= rows.shape[1] else rows[:0]
        for line in (*rows, *columns):
            line.fill_(1)
            assert witness_of([("weight", weight)]) != before, (shape, line)
            line.fill_(0)
        assert witness_of([("weight", weight)]) == before


def test_numbers_are_compared_by_their_bits_so_that_nan_is_what_it_was(readings):
    model = net()
    with torch.no_grad():
        model.a.weight.fill_(float("nan"))
    assert describe_base(model) == describe_base(model)
    assert readings == [model]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_a_base_in_fewer_bits_is_remembered_as_well(readings, dtype):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)
    before = describe_base(model)
    assert describe_base(model) == before
    model[0].weight.data.copy_(torch.zeros(8, 8).to(dtype))
    assert describe_base(model) != before
    assert len(readings) == 2


def test_memory_that_other_processes_may_write_to_is_read_each_time():
    model = net()
    model.share_memory()
    before = describe_base(model)
    writer = torch.multiprocessing.get_context("fork").Process(target=model.a.weight.data[3, 5:6].fill_, args=(9.0,))
    writer.start()
    writer.join()
    assert model.a.weight[3, 5] == 9
    assert describe_base(model)["base_fingerprint"] == base_fingerprint(model) != before["base_fingerprint"]


def test_what_counts_no_versions_is_read_each_time():
    with torch.inference_mode():
        model = net()
        before = describe_base(model)
        model.a.weight[3, 5] += 1
        assert describe_base(model) != before


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_model_is_a_base_of_its_own(twin: Any, readings):
    model = net()
    inject(model, CONFIG)
    before = describe_base(model)
    other = twin(model)
    assert describe_base(other) == before
    with torch.no_grad():
        other.a.weight[3, 5] += 1
    assert describe_base(other) != before
    assert describe_base(model) == before
    assert readings == [model, other, other]


def test_other_rows_of_an_embedding_that_are_trained_leave_another_base():
    model = net()
    marks = set()
    for tokens in ([1], [1, 2]):
        inject(model, LoRAConfig(target_modules=[], trainable_token_indices=tokens))
        assert describe_base(model)["base_fingerprint"] == base_fingerprint(model)
        marks.add(base_fingerprint(model))
        remove(model)
    assert len(marks) == 2


def test_a_base_that_is_quantized_after_is_described_anew():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32))
    before = describe_base(model)
    model.to("cpu")
    after = describe_base(model)
    assert "Params4bit" in after["base_dtypes"]
    assert after != before


def test_a_single_number_that_was_written_past_torch_is_seen_by_a_full_reading_alone():
    model = net()
    before = describe_base(model)
    model.a.weight.data[3, 5] += 1
    assert describe_base(model) == before
    assert base_fingerprint(model) != before["base_fingerprint"]


def test_a_model_that_is_gone_is_forgotten():
    model = net()
    describe_base(model)
    count = len(state._DESCRIBED)
    del model
    gc.collect()
    assert len(state._DESCRIBED) < count
