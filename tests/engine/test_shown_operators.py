"""A shown weight is the adapted one for torch's operators too: TorchScript, transforms, custom operators, lists."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randomise, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora.engine import LoRAConfig, inject
from lightning_lora.engine.forwards import SCOPE
from lightning_lora.engine.optim import fit_optimizers
from lightning_lora.errors import AdapterStateError

X = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "e": nn.Embedding(5, 8)}).double()
    inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["a", "e"], **fields}))
    randomise(model)
    return model


def exact(model: Any) -> Tensor:
    layer = model["a"]
    return layer._parameters["weight"].detach() + layer.lora.scale * layer.lora_B @ layer.lora_A


def times(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w.t())


@torch.library.custom_op("lightning_lora_tests::times", mutates_args=())
def times_op(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


times_op.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.t() @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("lightning_lora_tests::clip_", mutates_args=["w"])
def clip_op(w: Tensor, limit: float) -> None:
    w.clamp_(-limit, limit)


def traced(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = torch.jit.trace(times, (X, torch.ones(8, 8, dtype=torch.float64)))(x, w)
    return y


def scripted(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = torch.jit.script(times)(x, w)
    return y


def saddle(w: Tensor) -> Tensor:
    return torch.tanh(X @ w).pow(2).sum()


USES: dict[str, Callable[[Tensor], Any]] = {
    "a traced function": lambda w: traced(X, w),
    "a scripted function": lambda w: scripted(X, w),
    "a scripted function of a view": lambda w: scripted(X, w.t()[:, :8]),
    "a custom operator": lambda w: torch.ops.lightning_lora_tests.times(X, w),
    "a custom operator of a view": lambda w: times_op(X, w.t()),
    "an overload of an operator": lambda w: torch.ops.aten.mm.default(X, w.t()),
    "vmap over it": lambda w: torch.func.vmap(lambda row: row @ X.t())(w),
    "vmap that closes over it": lambda w: torch.func.vmap(lambda x: w @ x)(X),
    "grad by it": lambda w: torch.func.grad(saddle)(w),
    "grad that closes over it": lambda w: torch.func.grad(lambda x: (w @ x).tanh().sum())(X[0]),
    "jvp by it": lambda w: torch.func.jvp(saddle, (w,), (torch.ones(8, 8, dtype=torch.float64),))[1],
    "jacrev that closes over it": lambda w: torch.func.jacrev(lambda x: torch.tanh(w @ x))(X[0]),
    "a list": lambda w: torch._foreach_mul([w, w.t()], 2.0)[1],
    "a copy by torch.tensor": lambda w: torch.tensor(w.detach().tolist(), dtype=torch.float64),
    "NumPy": lambda w: torch.tensor(w.detach().numpy().copy()),
    "DLPack": lambda w: torch.from_dlpack(w.detach()),
    "a norm without gradients, and then itself": lambda w: F.linear(X, w) / (lambda n: n.norm())(w.detach()),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_torch_computes_with_it_is_computed_with_the_adapted_weight(use: Callable[[Tensor], Any]):
    model = adapted()
    torch.testing.assert_close(use(model["a"].weight), use(exact(model)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [n for n in USES if n.startswith(("a traced", "a scripted", "a custom", "vmap"))])
def test_its_gradients_reach_a_and_b(name: str):
    model, use = adapted(), USES[name]
    layer = model["a"]
    given = torch.autograd.grad(use(layer.weight).sum(), (layer.lora_A, layer.lora_B))
    A, B = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    W = layer._parameters["weight"].detach() + layer.lora.scale * B @ A
    torch.testing.assert_close(given, torch.autograd.grad(use(W).sum(), (A, B)))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_that_is_given_it_computes_with_the_adapted_weight(backend: str):
    model = adapted()
    torch._dynamo.reset()
    for w, wanted in ((model["a"].weight, exact(model)), (model["a"].weight.t(), exact(model).t())):
        torch.testing.assert_close(torch.compile(times, backend=backend)(X, w), times(X, wanted))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "an overload": lambda w: torch.ops.aten.mul_.Scalar(w, 0.0),
    "a list": lambda w: torch._foreach_mul_([w, w.t()], 0.0),
    "a copy into a list": lambda w: torch._foreach_copy_([w], [torch.zeros(8, 8, dtype=torch.float64)]),
    "a custom operator": lambda w: torch.ops.lightning_lora_tests.clip_(w.data, 0.0),
    "an out=": lambda w: torch.mul(torch.ones_like(w), 0.0, out=w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_reaches_the_base_parameter(write: Callable[[Tensor], Any]):
    model = adapted()
    with torch.no_grad():
        write(model["a"].weight)
    assert not model["a"]._parameters["weight"].any()


def test_a_write_into_its_array_is_an_error():
    with pytest.raises(ValueError, match="read-only"):
        adapted()["a"].weight.detach().numpy()[:] = 0


def average(model: Any) -> None:
    model["a"].weight.data.lerp_(model["e"].weight.data[:1], 0.1)


def normalise(model: Any) -> None:
    W = model["a"].weight
    W.data.div_(W.data.norm(dim=1, keepdim=True))


def write_rows(model: Any) -> None:
    model["e"].weight.data[2] = model["e"].weight.data[:2].mean(0)


def write_by_lists(model: Any) -> None:
    torch._foreach_add_([model["b"].weight.data, model["a"].weight.data], [X[:1], model["a"].weight.data])


@pytest.mark.parametrize("write", [average, normalise, write_rows, write_by_lists])
def test_values_that_have_an_adapter_in_them_are_not_written_into_a_base(write: Any):
    model = adapted()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(AdapterStateError, match="get the adapter a second time"):
        write(model)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [lambda w: w.clamp_(min=0), lambda w: w.mul_(torch.ones(8, 8).tril()), lambda w: w.data.copy_(torch.eye(8))],
    ids=["clamp", "mask", "codebook"],
)
def test_a_forward_that_changes_a_weight_of_its_child_in_place_is_an_error(change: Any):
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                change(self.a.weight)
            y: Tensor = self.a(x)
            return y

    model = Parent().double()
    inject(model, LoRAConfig(rank=2, target_modules=["a"]))
    with pytest.raises(AdapterStateError, match=r"is changed in a forward.*exclude_modules"):
        model(X)


def test_a_read_without_gradients_does_not_take_them_from_the_next():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            W = self.a.weight
            with torch.no_grad():
                size = W.norm()
            return F.linear(x, W / size)

    torch.manual_seed(0)
    model = Scaled().double()
    inject(model, LoRAConfig(rank=2, target_modules=["a"]))
    randomise(model)
    layer: Any = model.a
    given = torch.autograd.grad(model(X).sum(), layer.lora_B)[0]
    B = layer.lora_B.detach().clone().requires_grad_()
    W = layer._parameters["weight"].detach() + layer.lora.scale * B @ layer.lora_A.detach()
    torch.testing.assert_close(given, torch.autograd.grad(F.linear(X, W / W.detach().norm()).sum(), B)[0])


def test_rows_of_tokens_are_read_in_a_checkpointed_region_and_out_of_it():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
            self.head.weight = self.e.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.e(ids)
            y: Tensor = x @ self.head.weight.t()
            return y + checkpoint(lambda x: x @ self.head.weight.t(), x, use_reentrant=False)

    torch.manual_seed(0)
    model = Tied().double()
    inject(model, LoRAConfig(rank=2, target_modules=[], trainable_token_indices={"e": [1, 3]}))
    tokens: Any = model.e.lora_tokens
    model(torch.arange(5)).sum().backward()
    W = model.e._parameters["weight"].detach().clone()
    table = W.index_copy(0, torch.tensor([1, 3]), tokens.detach()).requires_grad_()
    (2 * table @ table.t()).sum().backward()
    assert table.grad is not None
    torch.testing.assert_close(tokens.grad, table.grad[[1, 3]])


# Attributes, and what else others do with a parameter.


def test_what_is_noted_on_a_weight_is_noted_on_the_parameter():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 6))
    model[0].weight.before = "inject"
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert model[0].weight.before == "inject"
    model[0].weight.tag = 1
    with torch.no_grad():
        model[0].lora_B.add_(1)  # after which another object is shown
    assert model[0].weight.tag == model[0]._parameters["weight"].tag == 1
    del model[0].weight.tag
    assert not hasattr(model[0].weight, "tag")
    assert not hasattr(model[0]._parameters["weight"], "tag")


def test_a_parameter_that_was_made_of_one_is_trained_as_any_other():
    model = adapted()
    own = nn.Parameter(model["a"].weight.detach())
    before = model["a"]._parameters["weight"].clone()
    optimizer = torch.optim.SGD([own], lr=1.0)
    (own * 1).sum().backward()
    optimizer.step()
    torch.testing.assert_close(own * 1, before - 1)


def test_a_view_that_would_be_a_leaf_is_an_error_and_a_copy_is_one():
    model = adapted()
    with pytest.raises(AdapterStateError, match=r"'a'.*clone\(\)"):
        model["a"].weight.detach().requires_grad_()
    leaf = model["a"].weight.detach().clone().requires_grad_()
    leaf.pow(2).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * exact(model).detach())
    assert not model["a"].weight.detach().requires_grad


def test_a_buffer_in_the_memory_of_one_is_an_error():
    model = adapted()
    with pytest.raises(AdapterStateError, match=r"'a'.*clone\(\)"):
        model.register_buffer("start", model["a"].weight.detach())
    model.register_buffer("start", model["a"].weight.detach().clone())
    torch.testing.assert_close(model.start, exact(model).detach())


def test_what_was_read_keeps_no_memory_when_the_model_moves():
    model = adapted()
    weight = model["a"].weight
    assert model["a"].weight is weight
    model.to(torch.float64)
    assert model["a"].weight is not weight


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_traced_model_reads_the_factors_that_it_has_when_it_runs():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a.weight) + self.a(x)

    torch.manual_seed(0)
    model: Any = Reader().double()
    inject(model, LoRAConfig(rank=2, target_modules=["a"]))
    run = torch.jit.trace(model, X)
    randomise(model)
    torch.testing.assert_close(run(X), reference(model)(X))
    with pytest.raises(AdapterStateError, match=r"'a' was read while torch.fx traces.*merge\(model\)"):
        torch.fx.symbolic_trace(copy.deepcopy(model))


def test_the_group_that_names_a_weight_is_that_of_its_adapter():
    model = adapted()
    b = list(model["b"].parameters())
    optimizer = torch.optim.AdamW([{"params": [*b], "lr": 0.1}, {"params": [model["a"].weight], "lr": 0.2}])
    for p in b:
        p.requires_grad_()
    model["e"].requires_grad_(False)
    fit_optimizers([optimizer], model)
    first, second = (list(map(id, group["params"])) for group in optimizer.param_groups)
    assert first == list(map(id, b))
    assert second == [id(model["a"].lora_A), id(model["a"].lora_B)]


def test_a_forward_that_was_interrupted_leaves_nothing_behind():
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.stops = nn.Linear(8, 8), True

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.a.weight.t()
            if self.stops:
                raise KeyboardInterrupt
            return y

    model = Interrupted().double()
    inject(model, LoRAConfig(rank=2, target_modules=["a"]))
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.stops = False
    model(X)
    assert SCOPE.get() is None


@pytest.fixture
def one_process() -> Any:
    dist = torch.distributed
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("there is no process group to make")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharding_an_adapted_model_leaves_its_base_as_it_is(one_process: Any):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    inject(model, LoRAConfig(rank=2, target_modules=["0", "2"]))
    randomise(model)
    before, y = {name: t.clone() for name, t in model.state_dict().items()}, model(X).detach()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    torch.testing.assert_close(model(X), y)
    model.to(torch.float64)  # which looks the parameters up again
    torch.testing.assert_close(model(X), y)
    for name, t in model.state_dict().items():
        assert t.full_tensor().equal(before[name])
