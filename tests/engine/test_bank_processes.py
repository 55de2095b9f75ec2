"""A bank where processes are forked beside busy threads, and what is left elsewhere or earlier than it was entered."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_tensors, disabled, inject, merged
from lightning_lora.engine.bank import Bank
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError, BankError
from tests.engine.bank_models import MOST, close_to, served, small
from tests.processes import forked


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class SlowStore:
    """Keeps rows; whoever puts one waits until `go_on`."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.begun, self.go_on = threading.Event(), threading.Event()

    def put(self, name: str, row: Tensor) -> None:
        self.begun.set()
        assert self.go_on.wait(30)
        self.rows[name] = row.clone()

    def take(self, name: str) -> Tensor:
        return self.rows[name]

    def drop(self, name: str) -> None:
        del self.rows[name]


def outputs_are_right(base: nn.Module, bank: Bank, alone: dict[str, nn.Module], x: Tensor) -> bool:
    right = []
    for name in bank.names:
        with bank.use(name):
            right.append(close_to(base(x), alone[name](x)))
    return len(right) > 1 and all(right)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_while_an_adapter_moves_has_it_where_it_went():
    base, factors, alone = small(3)
    store = SlowStore()
    bank = served(base, 1, MOST, host_capacity=0, disk=store)
    bank.put("a0", factors["a0"])
    moves = threading.Thread(target=bank.put, args=("a1", factors["a1"]))
    moves.start()
    assert store.begun.wait(30)
    threading.Timer(0.2, store.go_on.set).start()  # whoever forks waits for it
    x = torch.randn(3, 6)
    assert forked(lambda: outputs_are_right(base, bank, alone, x))
    moves.join()
    assert outputs_are_right(base, bank, alone, x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("holds", ["the lock", "an adapter", "a folded adapter", "the bare base"])
def test_what_another_thread_holds_is_held_by_nobody_in_a_process_that_is_forked(holds: str):
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, values in factors.items():
        bank.put(name, values)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        ways: dict[str, Any] = {"an adapter": bank.use("a0"), "the bare base": bank.use(None)}
        with torch.no_grad(), ways.get(holds) or (bank._slots.lock if holds == "the lock" else bank.folded("a0")):
            inside.set()
            assert go_on.wait(0.2 if holds == "the lock" else 30) or holds == "the lock"

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    x = torch.randn(3, 6)

    def work() -> bool:
        right = outputs_are_right(base, bank, alone, x)
        with bank.folded("a1"):
            right &= close_to(base(x), alone["a1"](x))
        bank.close()  # refused while anything is in use
        return right

    assert forked(work)
    go_on.set()
    thread.join()
    assert outputs_are_right(base, bank, alone, x)
    assert forked(work)


def streamed(base: nn.Module, bank: Bank, name: Any, x: Tensor) -> Generator[Tensor, None, None]:
    with bank.use(name):
        while True:
            yield base(x)


def test_what_is_left_before_what_was_entered_after_it_leaves_that_in_use():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, values in factors.items():
        bank.put(name, values)
    x = torch.randn(3, 6)
    plain = base(x)
    first, second = streamed(base, bank, "a0", x), streamed(base, bank, "a1", x)
    assert close_to(next(first), alone["a0"](x))
    assert close_to(next(second), alone["a1"](x))
    with pytest.raises(BankError, match=r"bank\.use\('a0'\).* was left .*while one that was entered after it is open"):
        first.close()
    assert close_to(next(second), alone["a1"](x)), "the bare base"
    second.close()
    assert base(x).equal(plain)
    assert not bank._slots.busy()


def test_generators_in_one_thread_do_not_compute_with_each_others_adapters():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, values in factors.items():
        bank.put(name, values)
    x = torch.randn(3, 6)
    for other in ("a1", None, ["a1", None, "a1"]):
        first, second = streamed(base, bank, "a0", x), streamed(base, bank, other, x)
        assert close_to(next(first), alone["a0"](x))
        expected = next(second)
        with pytest.raises(AdapterStateError, match=r"'streamed', inside of its .* while .* is open.* of its own"):
            next(first)
        assert next(second).equal(expected)
        second.close()
        first = streamed(base, bank, "a0", x)
        assert close_to(next(first), alone["a0"](x))
        first.close()

    apart = {name: (contextvars.copy_context(), streamed(base, bank, name, x)) for name in ("a0", "a1")}
    for name in ("a0", "a1", "a0", "a1"):
        context, rows = apart[name]
        assert close_to(context.run(next, rows), alone[name](x))
    for context, rows in apart.values():
        context.run(rows.close)

    @contextlib.contextmanager
    def using(name: str) -> Iterator[None]:  # a generator that is suspended while the block runs
        with bank.use(name):
            yield

    with using("a0"):
        with using("a1"):
            assert close_to(base(x), alone["a1"](x))
        with bank.use("a1"):
            assert close_to(base(x), alone["a1"](x))
        assert close_to(base(x), alone["a0"](x))
    assert not bank._slots.busy()


def test_what_is_left_elsewhere_than_it_was_entered_is_told_and_in_use_no_more():
    base, factors, alone = small(1)
    bank = served(base, 1, MOST)
    bank.put("a0", factors["a0"])
    x = torch.randn(3, 6)

    async def in_tasks() -> None:
        rows = streams()
        assert close_to(await asyncio.create_task(anext_of(rows)), alone["a0"](x))
        with pytest.raises(BankError, match="was left in another thread or task"):
            await asyncio.create_task(closed(rows))

    async def streams() -> Any:
        with bank.use("a0"):
            yield base(x)

    async def anext_of(rows: Any) -> Tensor:
        return await rows.__anext__()

    async def closed(rows: Any) -> None:
        await rows.aclose()

    asyncio.run(in_tasks())
    assert not bank._slots.busy()
    bank.put("a0", factors["a0"], replace=True)
    bank.close()


def test_layers_that_were_switched_off_by_two_generators_are_off_until_both_are_closed():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    plain = base(x)
    inject(base, LoRAConfig(rank=2))
    for tensor in adapter_tensors(base).values():
        tensor.normal_()
    adapted = base(x)

    def references() -> Iterator[Tensor]:
        with disabled(base):
            while True:
                yield base(x)

    first, second = references(), references()
    assert next(first).equal(plain)
    assert next(second).equal(plain)
    first.close()
    assert next(second).equal(plain)
    second.close()
    assert base(x).equal(adapted)


def test_layers_that_were_switched_off_are_on_where_another_thread_has_left():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(base, LoRAConfig(rank=2))
    for tensor in adapter_tensors(base).values():
        tensor.normal_()
    x = torch.randn(2, 4)
    adapted = base(x)
    off, errors = disabled(base), []
    off.__enter__()

    def leave() -> None:
        with pytest.raises(AdapterStateError, match="left in another thread") as error:
            off.__exit__(None, None, None)
        errors.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert errors
    with disabled(base):  # of the same thread or not, what was left is not around it
        assert not base(x).equal(adapted)
    assert base(x).equal(adapted)
    with merged(base):
        torch.testing.assert_close(base(x), adapted)


class Waiting(dict[str, Any]):
    """Parameters that take long to list."""

    def __init__(self) -> None:
        super().__init__(a=None)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def items(self) -> Any:
        self.begun.set()
        self.go_on.wait()
        return super().items()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_while_another_thread_lists_a_model_lists_models() -> None:
    slow, other = nn.Module(), nn.Linear(2, 2)
    slow._parameters = waiting = Waiting()
    thread = threading.Thread(target=lambda: Tree.of(slow).parameters)
    thread.start()
    waiting.begun.wait()
    try:
        assert forked(lambda: len(Tree.of(other).parameters) == 2)
    finally:
        waiting.go_on.set()
        thread.join()
