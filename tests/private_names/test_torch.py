"""Private names of torch, transformers and bitsandbytes do what we rely on."""

from __future__ import annotations

import inspect
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, get_worker_info

import lightning_lora
from lightning_lora.engine import torch_private
from lightning_lora.errors import MovedError
from tests.private_names.moved import moved


def test_torch_func_is_seen():
    seen: list[bool] = []
    torch.func.vmap(lambda x: seen.append(torch_private.under_transforms()) or x)(torch.zeros(2))
    assert (seen, torch_private.under_transforms()) == ([True], False)


def test_a_mode_is_seen():
    with Operations():
        assert torch_private.modes() == 1
    assert torch_private.modes() == 0


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def fx_seen() -> list[bool]:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch_private.is_fx_traced())
            return x

    torch.fx.symbolic_trace(Asks())
    return [*seen, torch_private.is_fx_traced()]


def test_torch_fx_is_seen():
    assert fx_seen() == [True, False]


def test_nodes_are_numbered_in_the_order_in_which_they_are_made():
    first = torch_private.next_node()
    y = torch.ones(1, requires_grad=True) * 2
    assert torch_private.number_of(y.grad_fn) == first
    assert torch_private.next_node() == first + 1


def test_a_backward_pass_says_which_one_it_is_where_it_is_and_when_it_ends():
    y = torch.ones(1, requires_grad=True) * 2
    seen: list[Any] = []

    def begins(_: Tensor) -> None:
        seen.append((torch_private.backward_task() >= 0, torch_private.node_now() is y.grad_fn))
        torch_private.when_backward_ends(lambda: seen.append("ends"))

    y.register_hook(begins)
    y.sum().backward()
    assert seen in ([(True, True), "ends"], [(True, False), "ends"])  # the node of the hook, or the one before it
    assert (torch_private.backward_task(), torch_private.node_now()) == (-1, None)


def test_a_checkpoint_that_is_not_reentrant_sets_hooks_on_saved_tensors():
    seen: list[bool] = []

    def inside(x: Tensor) -> Tensor:
        seen.append(torch_private.saved_tensors_hooks(True) is not None)
        return x * 2

    checkpoint(inside, torch.ones(1, requires_grad=True), use_reentrant=False)
    assert (seen, torch_private.saved_tensors_hooks(True)) == ([True], None)


def test_a_stand_in_lies_in_the_memory_of_the_tensor_and_can_be_handled_without_its_own_methods():
    class Refuses(nn.Parameter):
        @classmethod
        def __torch_function__(cls, *_: Any) -> Any:
            raise AssertionError

    own = torch.ones(2)
    it = torch_private.stand_in(Refuses, own, True)
    with torch_private.without_torch_function():
        assert (type(it), it.data_ptr(), it.requires_grad, it.is_leaf) == (Refuses, own.data_ptr(), True, True)


def test_a_tensor_tells_its_changes_and_whether_it_is_a_view():
    t = torch.zeros(2)
    before = torch_private.version(t)
    t.add_(1)
    assert torch_private.version(t) == before + 1
    assert torch_private.is_view(t[:1])
    assert not torch_private.is_view(t)


def test_an_operator_says_what_it_writes_to():
    first, second, *_ = torch_private.schema(torch.ops.aten.add_.Tensor).arguments
    assert first.alias_info.is_write
    assert second.alias_info is None
    assert torch_private.schema(len) is None


class _Told(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        import numpy

        return get_worker_info().seed, int(numpy.random.randint(2**31))


def test_numpy_is_seeded_in_a_worker_as_we_think():
    import numpy

    loader = DataLoader(_Told(), num_workers=1, persistent_workers=True, generator=torch.Generator())
    assert torch_private.living_iterator(loader) is None
    ((seed, drawn),) = list(loader)
    iterator = torch_private.living_iterator(loader)
    torch_private.send_seed(iterator, 3, base=int(seed))
    assert (iterator._base_seed, torch_private.shared_seed(iterator)) == (int(seed), 3)
    assert int(numpy.random.RandomState(torch_private.numpy_seed(int(seed), 0)).randint(2**31)) == int(drawn)


def test_processes_have_a_store(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        store = torch_private.processes_store()
        store.set("key", b"value")
        assert store.get("key") == b"value"
        store.wait(["key"], lightning_lora.training.run_state._PATIENCE)
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_are_put_on_and_taken_off():
    seen: list[str] = []
    module = nn.Linear(1, 1)
    for name in torch_private.OVERRIDDEN:
        assert hasattr(nn.Module, name), moved(f"torch.nn.Module.{name}")
    torch_private.put_forward_hooks(module, "ours", lambda *_: seen.append("a"), lambda *_: seen.append("b"))
    module(torch.zeros(1, 1))
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 2))
    torch_private.drop_forward_hooks(module, lambda key, _: key == "ours")
    module(torch.zeros(1, 1))
    assert seen == ["a", "b", "a", "b"]


def test_a_call_of_a_module_tells_the_module_and_its_arguments():
    found_calls: list[Any] = []

    class Looks(nn.Module):
        def forward(self, x: int, *, y: int) -> None:
            frame: Any = sys._getframe()
            while frame is not None and frame.f_code is not torch_private.CALL:
                frame = frame.f_back
            found_calls.append(torch_private.called(frame))

    module = Looks()
    module(1, y=2)
    assert found_calls == [(module, (1,), {"y": 2})]


def saved_names(module: nn.Module) -> list[str]:
    return [name for name, _ in torch_private.persistent_buffers(module)]


def with_buffers() -> nn.Module:
    module = nn.Sequential(nn.BatchNorm1d(2))
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("left_out", torch.zeros(1), persistent=False)
    return module


def test_buffers_that_no_state_dict_holds_are_known():
    assert saved_names(with_buffers()) == ["kept"]


CONVOLUTIONS = [
    {"padding": 0}, {"padding": (1, 2)}, {"padding": "same", "dilation": (1, 3)}, {"padding": "valid"},
    {"padding": (1, 2), "padding_mode": "zeros"},
]  # fmt: skip


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_a_convolution_pads_as_we_pad_and_by_hand_where_the_name_is_gone(settings: dict[str, Any]):
    module = nn.Conv2d(1, 1, (2, 3), **{"padding_mode": "circular", **settings})
    x = torch.randn(1, 1, 6, 7)
    for _ in range(2):
        padded, rest = torch_private.padded(module, x)
        y = F.conv2d(padded, module.weight, module.bias, 1, rest, module.dilation)
        assert torch.equal(y, module(x))
        assert torch.equal(torch_private.convolved(module, x, module.weight, module.bias), y)
        kept = vars(module).pop(torch_private.PADDING)  # torch needs it itself
        again, left = torch_private.padded(module, x)
        assert torch.equal(again, padded)
        assert left == rest
        vars(module)[torch_private.PADDING] = kept


def test_a_class_that_convolves_otherwise_is_known(monkeypatch: pytest.MonkeyPatch):
    class Other(nn.Conv2d):
        def _conv_forward(self, *given: Any) -> Tensor:
            return super()._conv_forward(*given)

    assert torch_private.convolves_otherwise(Other, nn.Conv2d)
    assert not torch_private.convolves_otherwise(nn.Conv2d, nn.Conv2d)
    for cls in (nn.Conv2d, nn.modules.conv._ConvNd):
        monkeypatch.delattr(cls, "_conv_forward")
    assert torch_private.convolves_otherwise(nn.Conv2d, nn.Conv2d)


def test_a_transposed_convolution_gets_the_size_that_is_asked_for():
    module, x = nn.ConvTranspose1d(1, 1, 3, stride=2), torch.randn(1, 1, 4)
    padding = torch_private.output_padding(module, x, [10])
    assert torch.equal(F.conv_transpose1d(x, module.weight, module.bias, 2, 0, padding), module(x, [10]))
    assert torch_private.output_padding(module, x, None) == module.output_padding
    with pytest.raises(MovedError, match="_output_padding"):
        torch_private.output_padding(SimpleNamespace(stride=1, padding=0, kernel_size=[1], dilation=1), x, [10])


def test_a_recurrent_layer_has_a_flat_list_of_weights():
    module = nn.LSTM(2, 2)
    assert [getattr(module, name) is w for name, w in zip(torch_private.flat_weights(module), module._flat_weights)]
    del vars(module)["_flat_weights"]
    with pytest.raises(MovedError, match="_flat_weights"):
        torch_private.flat_weights(module)


def test_an_optimizer_says_that_it_calls_hooks(monkeypatch: pytest.MonkeyPatch):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    assert torch_private.calls_hooks(optimizer)
    monkeypatch.delattr(torch.optim.SGD.step, "hooked")
    assert not torch_private.calls_hooks(optimizer)


def test_layers_with_running_statistics_have_one_class():
    assert all(issubclass(cls, torch_private.NORMS) for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d))
    assert not issubclass(nn.LayerNorm, torch_private.NORMS)


def test_generate_has_the_local_variables_from_which_a_bank_knows_its_beams():

    from transformers.generation.utils import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    for name in torch_private.GENERATE_LOCALS:
        assert name in code.co_varnames + code.co_cellvars, moved(f"transformers.GenerationMixin.generate's {name}")


def test_bitsandbytes_has_the_inverse_of_its_rearrangement():
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip(f"bitsandbytes {metadata.version('bitsandbytes')} does not rearrange weights")
    name = "_convert_weight_packed_for_cpu_inverse"
    assert hasattr(functional, name), moved(f"bitsandbytes.functional.{name}")
