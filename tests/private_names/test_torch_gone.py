"""Without a private name of torch the plain path is taken, or MovedError raised."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, inject
from lightning_lora.engine import disabled, fused, torch_private
from lightning_lora.errors import MovedError
from lightning_lora.training.run_state import of_all_ranks
from tests.private_names.moved import take_away
from tests.private_names.test_torch import Operations, fx_seen, saved_names, with_buffers


@pytest.fixture
def torch_without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Loads engine/torch_private.py as it would be in a torch without some names."""

    def without(*paths: str) -> None:
        take_away(monkeypatch, *paths)
        importlib.reload(torch_private)

    yield without
    monkeypatch.undo()
    importlib.reload(torch_private)


@pytest.mark.parametrize("name", ["_are_functorch_transforms_active", "_len_torch_dispatch_stack"])
def test_nothing_is_fused_where_it_cannot_be_known_who_looks_in(name: str, torch_without: Callable[..., None]):
    torch_without(f"torch._C:{name}")
    assert fused.sees_every_step()
    x, W, A, B = (torch.randn(s) for s in ((5, 4), (3, 4), (2, 4), (3, 2)))
    with Operations() as seen:
        y = fused.linear(x, W, None, A, B, 0.5)
    assert torch.equal(y, F.linear(x, W) + 0.5 * F.linear(F.linear(x, A), B))
    assert not [name for name in seen.names if name.endswith("_")]  # a mode may keep a result, which must stay


def test_tracing_is_seen_by_the_public_queries(torch_without: Callable[..., None]):
    torch_without("torch._C:_is_tracing", "torch.fx._symbolic_trace:is_fx_symbolic_tracing")
    seen: list[bool] = []
    with pytest.warns(DeprecationWarning, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: (seen.append(torch_private.traces()), x + 1)[1], torch.zeros(1), check_trace=False)
    assert (seen, torch_private.traces()) == ([True], False)
    assert fx_seen() == [True, False]


def test_forward_mode_is_supposed_where_its_level_is_not_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert torch_private.may_be_dual()


@pytest.mark.parametrize(
    "path",
    [
        "torch._C:_autograd._get_sequence_nr", "torch._C:_current_autograd_node", "torch._C:_current_graph_task_id",
        "torch._C:_autograd._top_saved_tensors_default_hooks",
    ],
)  # fmt: skip
def test_disabled_does_not_guess_where_autograd_does_not_tell(path: str, torch_without: Callable[..., None]):
    model = nn.Sequential(nn.Linear(2, 2))
    inject(model, LoRAConfig(rank=1, target_modules=["0"]))
    x = torch.ones(1, 2, requires_grad=True)
    before = model(x)
    torch_without(path)
    with pytest.raises(MovedError, match=path.rpartition(".")[2].rpartition(":")[2]), disabled(model):
        model(x)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("torch._C:DisableTorchFunctionSubclass", lambda: torch_private.without_torch_function()),
        ("torch:Tensor._make_subclass", lambda: torch_private.stand_in(nn.Parameter, torch.ones(1), False)),
        ("torch:Tensor._version.__get__", lambda: torch_private.version(torch.ones(1))),
        ("torch.autograd:Variable._execution_engine.queue_callback", lambda: torch_private.when_backward_ends(int)),
        ("torch.utils.data._utils.worker:_generate_state", lambda: torch_private.send_seed(SimpleNamespace(), 1)),
    ],
)
def test_what_has_no_plain_path_is_said(path: str, call: Callable[[], Any], torch_without: Callable[..., None]):
    torch_without(path)
    with pytest.raises(MovedError):
        call()


def test_what_has_a_plain_path_takes_it(torch_without: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    store = "torch.distributed.distributed_c10d:_get_default_store"
    torch_without("torch:Tensor._is_view", "torch._ops:OpOverload", store, "torch.nn.modules.batchnorm:_NormBase")
    assert torch_private.is_view(torch.ones(1))  # fused.py then makes a tensor that is none
    assert torch_private.schema(torch.ops.aten.add_.Tensor).arguments[0].alias_info.is_write
    assert issubclass(nn.BatchNorm2d, torch_private.NORMS)
    assert not issubclass(nn.LayerNorm, torch_private.NORMS)
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert of_all_ranks("own", may_be_alone=True) == ["own", None]


def test_parts_of_torch_that_keep_things_elsewhere_are_said(monkeypatch: pytest.MonkeyPatch):
    module = nn.Linear(1, 1)
    del vars(module)["_forward_hooks_always_called"]
    with pytest.raises(MovedError, match=r"no torch\.nn\.modules\.linear\.Linear\._forward_hooks_always_called"):
        torch_private.put_forward_hooks(module, 1, None, None)
    with pytest.raises(MovedError, match="a local variable called self"):
        torch_private.called(sys._getframe())
    with pytest.raises(MovedError, match="_sequence_nr"):
        torch_private.number_of(SimpleNamespace())
    with pytest.raises(MovedError, match="_shared_seed"):
        torch_private.send_seed(SimpleNamespace(_base_seed=1), 1)
    monkeypatch.setattr(torch_private, "OVERRIDDEN", ("_a_name_of_yesterday",))
    with pytest.raises(MovedError, match=r"no torch\.nn\.modules\.module\.Module\._a_name_of_yesterday"):
        inject(nn.Linear(2, 2), LoRAConfig(rank=1))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", SimpleNamespace())
    with pytest.raises(MovedError, match="_convert_weight_packed_for_cpu_inverse"):
        torch_private.unrearranged(torch.ones(1), None)


def test_buffers_are_asked_of_the_state_dict_where_a_module_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_private, "getattr", lambda *_: None, raising=False)
    assert saved_names(with_buffers()) == ["kept"]


def test_a_generate_with_other_local_variables_is_said(monkeypatch: pytest.MonkeyPatch):
    class GenerationMixin:
        def generate(self, generation_config: Any, batch_size: int, input_ids: Any) -> Any:
            return torch_private.generation()

    class Renamed:
        def generate(self, generation_config: Any, rows: int, input_ids: Any) -> Any:
            return torch_private.generation()

    fake: Any = ModuleType("transformers.generation.utils")
    fake.GenerationMixin = GenerationMixin
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    it = GenerationMixin()
    known = it.generate(1, 2, 3)
    assert list(known.values()) == [it, 1, 2, 3]
    assert torch_private.generation() is None
    renamed: Any = ModuleType(fake.__name__)
    renamed.GenerationMixin = Renamed
    monkeypatch.setitem(sys.modules, fake.__name__, renamed)
    with pytest.raises(MovedError, match="batch_size"):
        Renamed().generate(1, 2, 3)
