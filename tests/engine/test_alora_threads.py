"""Activated LoRA in one model that several threads call, or that is called inside of its own forward: each forward
has its own tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.engine import adapters
from lightning_lora.errors import AdapterStateError

from .test_alora import ROWS, adapted

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

ONE, TWO = torch.tensor(ROWS[:2]), torch.tensor(ROWS[2:4])


class Turns:
    """Lets two threads go on in turn, at every module that they both call."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = {"one": 0, "two": 0}

    def step(self, *_: Any) -> None:
        name = threading.current_thread().name
        if name not in self.count:
            return
        other = "two" if name == "one" else "one"
        with self.changed:
            self.count[name] += 1
            self.changed.notify_all()
            # The first is at most one step ahead of the second, and the second never ahead of the first.
            ahead = 1 if name == "one" else 0
            self.changed.wait_for(lambda: self.count[name] - self.count[other] <= ahead, timeout=20)

    def ends(self) -> None:
        with self.changed:
            self.count[threading.current_thread().name] = 1 << 30
            self.changed.notify_all()


def side_by_side(model: Any, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What the calls return, made in two threads whose steps take turns."""
    turns, results = Turns(), {}
    hooks = [m.register_forward_pre_hook(turns.step) for m in model.modules()]

    def run(name: str) -> None:
        try:
            results[name] = calls[name]()
        finally:
            turns.ends()

    threads = [threading.Thread(target=run, args=(name,), name=name) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for hook in hooks:
        hook.remove()
    return results


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_two_threads_give_what_each_gives_alone():
    model = adapted()
    alone = {"one": logits(model, ONE), "two": logits(model, TWO)}
    assert not alone["one"].equal(alone["two"])
    found = side_by_side(model, {"one": lambda: logits(model, ONE), "two": lambda: logits(model, TWO)})
    assert all(found[name].equal(alone[name]) for name in alone)
    swapped = side_by_side(model, {"one": lambda: logits(model, TWO), "two": lambda: logits(model, ONE)})
    assert swapped["one"].equal(alone["two"])
    assert swapped["two"].equal(alone["one"])


def test_two_threads_generate_what_each_generates_alone():
    model = adapted()

    def generate(ids: Tensor) -> Tensor:
        return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)

    alone = {"one": generate(ONE), "two": generate(TWO)}
    found = side_by_side(model, {"one": lambda: generate(ONE), "two": lambda: generate(TWO)})
    assert all(found[name].equal(alone[name]) for name in alone)


def gradients(model: Any, ids: Tensor) -> list[Tensor]:
    factors = [p for _, m in adapters(model) for p in (m.lora_A, m.lora_B)]
    return list(torch.autograd.grad(model(ids).logits.square().mean(), factors))


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_two_threads_train_as_each_does_alone(checkpointing: bool | None):
    model = adapted().train()
    model.enable_input_require_grads()
    alone = {"one": plain_backward(model, ONE), "two": plain_backward(model, TWO)}
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    # Gradients add up in the parameters: both threads write there, so only their sum is told.
    model.zero_grad()
    side_by_side(
        model,
        {
            "one": lambda: model(ONE).logits.square().mean().backward(),
            "two": lambda: model(TWO).logits.square().mean().backward(),
        },
    )
    for (_, m), one, two in zip(adapters(model), *alone.values()):
        torch.testing.assert_close(m.lora_B.grad, one + two)


def plain_backward(model: Any, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    return [m.lora_B.grad.clone() for _, m in adapters(model)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_computed_again_right_in_another_thread_than_the_forwards(reentrant: bool):
    """As on a GPU, where autograd has threads of its own."""
    model = adapted().train()
    model.enable_input_require_grads()
    alone = plain_backward(model, ONE)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    loss = model(ONE).logits.square().mean()
    logits(model.eval(), TWO)
    model.train()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join(60)
    for (_, m), expected in zip(adapters(model), alone):
        torch.testing.assert_close(m.lora_B.grad, expected)


def test_what_backward_passes_left_is_forgotten():
    model = adapted().train()
    invocation = next(adapters(model))[1].lora_invocation
    for _ in range(5):
        gradients(model, ONE)
    assert invocation.backwards == {}


def test_asyncio_tasks_give_what_each_gives_alone():
    model = adapted()

    async def both() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(logits, model, ids) for ids in (ONE, TWO) * 8))

    alone = [logits(model, ONE), logits(model, TWO)]
    assert all(found.equal(alone[i % 2]) for i, found in enumerate(asyncio.run(both())))


NESTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the model": logits,
    "the model inside": lambda model, ids: model.model(ids).last_hidden_state.detach(),
    "a generation": lambda model, ids: model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(
    "place", ["model", "model.embed_tokens", "model.layers.0", "model.layers.1.self_attn", "lm_head"]
)
@pytest.mark.parametrize("after", [True, False])
def test_a_forward_inside_a_forward_has_its_own_tokens_and_so_has_the_outer_one(kind: str, place: str, after: bool):
    model = adapted()
    outer, inner = logits(model, ONE), NESTED[kind](model, TWO)
    seen: list[Tensor] = []

    def call(*_: Any) -> None:
        if not seen:
            seen.append(inner[:0])  # not again, for the forward that this makes
            seen.append(NESTED[kind](model, TWO))

    module = model.get_submodule(place)
    hook = module.register_forward_hook(call) if after else module.register_forward_pre_hook(call)
    found = logits(model, ONE)
    hook.remove()
    assert found.equal(outer)
    assert seen[1].equal(inner)


def test_a_forward_inside_that_fails_leaves_the_outer_one_its_tokens():
    model = adapted()
    outer = logits(model, ONE)
    failed: list[str] = []

    def call(*_: Any) -> None:
        if not failed:
            failed.append("")
            try:
                model(torch.tensor([[99, 1]]))  # no such token
            except IndexError as error:
                failed.append(str(error))
            try:
                model(inputs_embeds=torch.randn(2, 7, 16))
            except AdapterStateError as error:
                failed.append(str(error))

    hook = model.model.layers[0].register_forward_pre_hook(call)
    found = logits(model, ONE)
    hook.remove()
    assert len(failed) == 3
    assert found.equal(outer)


def test_a_backward_inside_a_forward_computes_again_what_belongs_to_it():
    model = adapted().train()
    model.enable_input_require_grads()
    alone, outer = plain_backward(model, ONE), model(TWO).logits.detach()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    losses = [model(ONE).logits.square().mean()]

    def call(*_: Any) -> None:
        if losses:
            losses.pop().backward()

    hook = model.lm_head.register_forward_pre_hook(call)
    found = model(TWO).logits.detach()
    hook.remove()
    torch.testing.assert_close(found, outer)
    for (_, m), expected in zip(adapters(model), alone):
        torch.testing.assert_close(m.lora_B.grad, expected)


@pytest.mark.parametrize("how", ["around", "in place", "each layer"])
@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_model_hears_its_tokens_in_one_graph(how: str):
    model = adapted()
    expected = [logits(model, ids) for ids in (ONE, TWO)]
    compiled = model
    if how == "around":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    for module in {"around": [], "in place": [model], "each layer": model.model.layers}[how]:
        module.compile(backend="eager", fullgraph=True)
    for ids, wanted in zip((ONE, TWO), expected):
        torch.testing.assert_close(compiled(ids).logits, wanted)
