"""`with disabled(model)`: the bare base, bit for bit, by thread and task, and in what is computed again."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, randomise
from snapshot import assert_same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora import disabled, inject, merge, merged, remove
from lightning_lora.engine import Adapter, LoRAConfig, adapter_state_dict, adapter_tensors, adapters, switch
from lightning_lora.errors import AdapterStateError

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

every_case = pytest.mark.parametrize("case", CASES, ids=IDS)
reentrant_or_not = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Each test begins and ends with the switch unused, once its models are gone."""
    yield
    if switch.used:
        gc.collect()
    assert not switch.used


def trained(model: nn.Module, config: LoRAConfig | None = None, **fields: Any) -> nn.Module:
    """Adapted, and all that is trained moved: A, B and what is trained whole."""
    inject(model, config or LoRAConfig(**{"rank": 2, **fields}))
    randomise(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


@every_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_the_output_is_the_bases_bit_for_bit(case: Case, training: bool):
    base, x = case.model().train(training).requires_grad_(False), case.input()
    model = trained(copy.deepcopy(base), case.lora_config())
    torch.manual_seed(0)
    adapted = model(x)
    with disabled(model):
        assert model(x).equal(base(x))
    torch.manual_seed(0)
    assert model(x).equal(adapted)
    assert not model.eval()(x).allclose(base.eval()(x), atol=1e-3)


@every_case
def test_what_is_read_is_the_bases_and_remove_gives_back_the_base(case: Case):
    base = case.model()
    before = snapshot(base)
    model: Any = trained(base, case.lora_config())
    with disabled(model):
        for name, module in model.named_modules():
            for own, p in module._parameters.items():
                if p is not None and own not in getattr(module, "lora_names", ()):
                    key = f"{name}.{own}"
                    assert before["values"][key].equal(getattr(module, own)), key
                    assert isinstance(getattr(module, own), nn.Parameter)
    remove(model)
    assert_same(snapshot(model), before)


@every_case
def test_a_switched_model_is_pickled_copied_and_merged_as_another(case: Case):
    model, x = trained(case.model(), case.lora_config()).eval(), case.input()
    with torch.no_grad(), disabled(model):
        bare = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert other(x).equal(model(x))
            with disabled(other):
                assert other(x).equal(bare)


class Everything(nn.Module):
    """What is trained whole: a head, norms with statistics, a recurrent layer, an embedding, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(self.table(x)).flatten(0, 1)).view(*x.shape, 8)
        return self.head(self.lstm(y)[0]) + F.linear(y, self.head.weight)


TOKENS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["head", "norm", "lstm"]},
        {"bias": "all", "target_modules": ["first", "lstm"]},
        {"bias": "lora_only", "target_modules": ["first", "lstm"], "use_dora": True},
        {"bias": "all", "target_modules": ["first"], "modules_to_save": ["table"]},
        {"target_modules": ["first"], "trainable_token_indices": {"table": [1, 5]}},
        {"target_modules": ["lstm"], "modules_to_save": ["head"], "lora_bias": False, "init": "pissa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_trained_whole_acts_with_its_values_of_before(fields: dict[str, Any], dtype: torch.dtype):
    torch.manual_seed(0)
    # Frozen: torch's products round otherwise where a weight requires grad.
    base = Everything().eval().requires_grad_(False)
    model: Any = trained(copy.deepcopy(base), **{"target_modules": ["first"], **fields}).to(dtype)
    base.to(dtype)
    before = adapter_state_dict(model)
    for _ in range(2):
        with torch.no_grad(), disabled(model):
            assert model(TOKENS).equal(base(TOKENS))
            assert model.first.bias.equal(base.first.bias)
            assert model.lstm.bias_hh_l0.equal(base.lstm.bias_hh_l0)
        assert not model(TOKENS).allclose(base(TOKENS), atol=1e-3)
        assert all(t.equal(before[name]) for name, t in adapter_state_dict(model).items())
    # What a module in training mode writes to its buffers there is not kept, in what is trained or in the original.
    model.train()
    with disabled(model):
        model(TOKENS)
    assert all(t.equal(before[name]) for name, t in adapter_state_dict(model).items())
    remove(model)
    assert_same({"values": snapshot(model)["values"]}, {"values": snapshot(base)["values"]})
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert model.eval()(TOKENS).equal(base(TOKENS))


def test_what_is_trained_after_a_switch_is_what_the_optimizer_has():
    torch.manual_seed(0)
    model: Any = trained(Everything(), target_modules=["first"], modules_to_save=["head", "lstm"], bias="all")
    other = copy.deepcopy(model)
    for m, switches in ((model, True), (other, False)):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            if switches:
                with torch.no_grad(), disabled(m):
                    m.eval()(TOKENS)
                m.train()
            optimizer.zero_grad()
            m(TOKENS).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert a.equal(b), name


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class OwnLoRA(Adapter, adapts=Own):
    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, 6), (6, rank)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        return self.base_forward(x) + x @ A.T @ B.T


def test_a_geometry_of_a_users_own_that_has_a_forward_is_switched_off():
    base = nn.Sequential(Own())
    model = trained(copy.deepcopy(base), target_modules=["0"])
    x = torch.randn(3, 6)
    with disabled(model):
        assert model(x).equal(base(x))
    assert not model(x).allclose(base(x))


def two_layers() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    return base, trained(copy.deepcopy(base)), torch.randn(3, 6)


def test_another_thread_has_its_adapters_and_may_switch_its_own_off():
    base, model, x = two_layers()
    adapted, found = model(x).detach(), []

    def there() -> None:
        found.append(model(x).detach())
        with disabled(model):
            found.append(model(x).detach())

    with disabled(model):
        thread = threading.Thread(target=there)
        thread.start()
        thread.join()
        assert model(x).equal(base(x))
    assert found[0].equal(adapted)
    assert found[1].equal(base(x))


def test_another_task_has_its_adapters():
    base, model, x = two_layers()
    adapted = model(x).detach()

    async def off(inside: asyncio.Event, done: asyncio.Event) -> None:
        with disabled(model):
            inside.set()
            await done.wait()
            assert model(x).equal(base(x))

    async def both() -> None:
        inside, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(off(inside, done))
        await inside.wait()
        assert model(x).equal(adapted)
        done.set()
        await task

    asyncio.run(both())


def test_another_model_is_not_switched_off_and_blocks_may_be_nested():
    base, model, x = two_layers()
    other = copy.deepcopy(model)
    adapted = model(x).detach()
    with disabled(model):
        assert other(x).equal(adapted)
        with disabled(other), disabled(model):
            assert other(x).equal(base(x))
        assert other(x).equal(adapted)
        assert model(x).equal(base(x))
        with pytest.raises(ZeroDivisionError), disabled(other):
            raise ZeroDivisionError
        assert other(x).equal(adapted)
    assert model(x).equal(adapted)


def test_a_part_that_was_adapted_by_itself_is_switched_off_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    base = copy.deepcopy(model)
    trained(model[1], target_modules=["0"])
    x = torch.randn(3, 6)
    for part in (model, model[1]):
        with disabled(part):
            assert model(x).equal(base(x))
    assert not model(x).allclose(base(x))


def gradients(output: Tensor, inputs: Tensor) -> Tensor:
    inputs.grad = None
    output.square().sum().backward(retain_graph=True)
    assert inputs.grad is not None
    return inputs.grad


def test_gradients_pass_through_the_base_and_reach_no_adapter():
    base, model, x = two_layers()
    x.requires_grad_()
    with disabled(model):
        output = model(x)
    assert gradients(output, x).equal(gradients(base(x), x))
    with disabled(model):
        model(x).sum().backward()
    assert all(t.grad is None for t in adapter_tensors(model).values())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, depth: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            # A branch beside the layers, which asks for the region first in the backward pass.
            x = checkpoint(lambda x, block=block: block(x) + (2 * x).sin(), x, use_reentrant=self.use_reentrant)
        return x


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x) + (2 * x).sin()
    return x


@reentrant_or_not
def test_what_a_backward_pass_computes_again_is_what_the_forward_was(use_reentrant: bool):
    torch.manual_seed(0)
    base = Checkpointed(use_reentrant)
    model, x = trained(copy.deepcopy(base)), torch.randn(3, 6, requires_grad=True)
    of_base, of_adapted = gradients(plainly(base, x), x), gradients(plainly(model, x), x)
    assert not of_base.allclose(of_adapted, atol=1e-3)
    for _ in range(2):
        with disabled(model):
            off = model(x)
        on = model(x)
        with disabled(model):
            again = model(x)
            assert gradients(on, x).equal(of_adapted)  # inside of a block that was opened after its forward
            assert gradients(again, x).equal(of_base)
        assert gradients(off, x).equal(of_base)
        # Both in one backward pass, as a loss of a policy and its reference.
        with disabled(model):
            off = model(x)
        both = gradients(torch.cat([model(x), off]), x)
        torch.testing.assert_close(both, of_adapted + of_base)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@reentrant_or_not
def test_what_a_hook_computes_in_a_backward_pass_follows_the_block_that_it_opened(use_reentrant: bool):
    torch.manual_seed(0)
    base = Checkpointed(use_reentrant)
    model, x, found = trained(copy.deepcopy(base)), torch.randn(3, 6, requires_grad=True), []

    def hook(g: Tensor) -> None:
        with disabled(model), torch.no_grad():
            found.append(model(x))

    on = model(x)
    on.register_hook(hook)
    assert gradients(on, x).equal(gradients(plainly(model, x), x))
    assert found[0].equal(base(x))


@reentrant_or_not
def test_two_threads_that_both_differentiate_under_checkpointing_are_right_or_told(use_reentrant: bool):
    torch.manual_seed(0)
    base = Checkpointed(use_reentrant)
    model, x = trained(copy.deepcopy(base)), torch.randn(3, 6, requires_grad=True)
    of_base, of_adapted = gradients(plainly(base, x), x), gradients(plainly(model, x), x)
    outcomes: list[Any] = []

    def work(is_off: bool) -> None:
        for _ in range(4):
            if is_off:
                with disabled(model):
                    output = model(x)
            else:
                output = model(x)
            try:
                outcomes.append(gradients(output, x).equal(of_base if is_off else of_adapted))
            except AdapterStateError as error:
                outcomes.append(str(error))

    for is_off in (True, False, True):
        thread = threading.Thread(target=work, args=[is_off])
        thread.start()
        thread.join()
    assert len(outcomes) == 12
    assert all(o is True or "in one thread" in o for o in outcomes), outcomes


@reentrant_or_not
def test_a_reference_pass_in_one_thread_leaves_training_in_another_alone(use_reentrant: bool):
    torch.manual_seed(0)
    model = trained(Checkpointed(use_reentrant))
    x = torch.randn(3, 6, requires_grad=True)
    expected = gradients(plainly(model, x), x)
    inside, done, found = threading.Event(), threading.Event(), []

    def reference() -> None:
        with torch.no_grad(), disabled(model):
            plainly(model, x)
            inside.set()
            done.wait()

    def training() -> None:
        inside.wait()
        for _ in range(3):
            found.append(gradients(model(x), x).equal(expected))
        done.set()

    threads = [threading.Thread(target=f) for f in (reference, training)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


def test_nothing_is_kept_of_passes_that_do_not_come_again():
    _, model, x = two_layers()
    with torch.no_grad(), disabled(model):
        checkpoint(model, x, use_reentrant=False)
    with disabled(model):
        model(x.requires_grad_()).sum().backward()
    assert not switch.used
    with disabled(model):
        checkpoint(model, x, use_reentrant=False)
    assert switch.used
    del model
    gc.collect()
    assert not switch.used


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_code_follows_the_switch():
    torch._dynamo.reset()
    base, model, x = two_layers()
    adapted = model(x).detach()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert compiled(x).equal(adapted)
        with disabled(model):
            assert compiled(x).equal(base(x))
        with disabled(compiled), torch.no_grad():
            assert compiled(x).equal(base(x))
    assert compiled(x).equal(adapted)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["conv2d-stride-padding", "embedding", "linear-dora", "linear-modules-to-save", "experts", "lstm"]
)
@torch.no_grad()
@pytest.mark.slow
def test_compiled_layers_of_each_kind_follow_the_switch(name: str):
    torch._dynamo.reset()
    case = next(case for case in CASES if case.name == name)
    base, x = case.model().eval(), case.input()
    model = trained(copy.deepcopy(base), case.lora_config())
    compiled = torch.compile(model, backend="eager")
    adapted = compiled(x)
    torch.testing.assert_close(adapted, model(x))
    for _ in range(2):
        with disabled(model):
            assert compiled(x).equal(base(x))
        assert compiled(x).equal(adapted)
    with torch.enable_grad(), disabled(model):  # of which a backward pass may compute something again
        checkpoint(model, x.requires_grad_() if x.is_floating_point() else x, use_reentrant=False)
    with torch.enable_grad():
        torch.testing.assert_close(compiled(x).detach(), adapted)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_code_that_is_compiled_as_one_graph_says_that_it_cannot_follow():
    torch._dynamo.reset()
    _, model, x = two_layers()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    adapted = compiled(x)
    with pytest.raises(torch._dynamo.exc.Unsupported), disabled(model):
        compiled(x)
    assert compiled(x).equal(adapted)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_function_may_hold_the_block():
    torch._dynamo.reset()
    base, model, x = two_layers()

    @torch.compile(backend="eager")
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), disabled(model):
            bare = model(x)
        return model(x), bare

    for _ in range(2):
        on, off = both(x)
        assert on.equal(model(x))
        assert off.equal(base(x))
    torch._dynamo.reset()


def test_an_adapter_is_saved_from_inside_as_it_was_trained():
    _, model, _ = two_layers()
    before = {name: t.clone() for name, t in adapter_state_dict(model).items()}
    with disabled(model):
        inside = adapter_state_dict(model)
    assert inside.keys() == before.keys()
    assert all(t.equal(before[name]) for name, t in inside.items())


def test_a_model_without_adapters_says_so():
    with (
        pytest.raises(AdapterStateError, match="Sequential has no adapters to disable: call inject"),
        disabled(nn.Sequential(nn.Linear(2, 2))),
    ):
        pass


def test_a_part_of_an_adapted_model_is_told_which_to_pass():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 6))
    inject(model, LoRAConfig(rank=2, modules_to_save=["1"], target_modules=["0.0"]))
    with pytest.raises(AdapterStateError, match="pass the module that inject was called on"), disabled(model[0]):
        pass


def test_merged_and_disabled_exclude_one_another():
    _, model, _ = two_layers()
    before = snapshot(model)
    with merged(model), pytest.raises(AdapterStateError, match="is merged"), disabled(model):
        pass
    for change in (merge, remove):
        with disabled(model), pytest.raises(AdapterStateError, match="switched off just now"):
            change(model)
    with disabled(model), pytest.raises(AdapterStateError, match="switched off just now"), merged(model):
        pass
    assert_same(snapshot(model), before)
    remove(model)
    assert not list(adapters(model))


def test_a_layer_that_was_parametrized_since_is_refused():
    _, model, _ = two_layers()
    nn.utils.parametrizations.spectral_norm(model[0], name="lora_A")
    with pytest.raises(AdapterStateError, match="changed its class after"), disabled(model):
        pass


def test_what_others_hold_by_a_tie_is_switched_as_well():
    torch.manual_seed(0)
    base: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    base[2].weight = base[1].weight
    model = trained(copy.deepcopy(base), target_modules=["0"], modules_to_save=["1", "2"])
    x = torch.randn(3, 6)
    with torch.no_grad(), disabled(model):
        assert model(x).equal(base(x))
    assert not model(x).allclose(base(x), atol=1e-3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inner", [True, False], ids=["inner-reentrant", "inner-not-reentrant"])
@pytest.mark.parametrize("begins", [True, False], ids=["begins-with-a-layer", "begins-with-a-checkpoint"])
@reentrant_or_not
def test_checkpoints_may_be_nested(use_reentrant: bool, inner: bool, begins: bool):
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    model, x = trained(copy.deepcopy(base), target_modules=["0", "1", "2"]), torch.randn(3, 6, requires_grad=True)

    def plain(m: nn.Module, x: Tensor) -> Tensor:
        return m[1]((m[0](x) if begins else x).tanh()).sin()

    def block(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: m[1](x).sin(), (m[0](x) if begins else x).tanh(), use_reentrant=inner)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: block(m, x), x, use_reentrant=use_reentrant)

    of_base, of_adapted = gradients(plain(base, x), x), gradients(plain(model, x), x)
    with disabled(model):
        off = run(model, x)
    on = run(model, x)
    for _ in range(2):
        torch.testing.assert_close(gradients(off, x), of_base)
        torch.testing.assert_close(gradients(on, x), of_adapted)
    torch.testing.assert_close(gradients(torch.cat([off, on]), x), of_base + of_adapted)
    torch.testing.assert_close(gradients(torch.cat([on, off]), x), of_base + of_adapted)
