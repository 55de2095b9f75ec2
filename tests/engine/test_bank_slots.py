"""Who has a slot, who waits, who may leave: under eviction, threads and errors nobody gets another's adapter."""

from __future__ import annotations

import contextvars
import copy
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject
from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BankError, ConfigError, TargetError
from tests.engine.bank_models import MOST, Small, close_to, served, small


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_base_keeps_its_keys_its_identity_and_its_bits():
    base, factors, _ = small(2)
    layer, keys, x = base.first, list(base.state_dict()), torch.randn(2, 6)
    before = base(x)
    bank = served(base, 2, MOST)
    bank.put("a0", factors["a0"])
    with bank.use("a0"):
        base(x)
    assert list(base.state_dict()) == keys
    assert isinstance(base.first, nn.Linear)
    bank.close()
    assert base.first is layer
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()
    assert base(x).equal(before)


def test_beyond_the_slots_the_longest_unused_waits_in_memory_and_then_in_the_store():
    written: list[str] = []

    class Shelf(dict[str, Tensor]):
        def put(self, name: str, row: Tensor) -> None:
            written.append(name)
            self[name] = row.clone()

        def take(self, name: str) -> Tensor:
            return self[name]

        def drop(self, name: str) -> None:
            del self[name]

    base, factors, alone = small(12)
    shelf, x = Shelf(), torch.randn(3, 6)
    bank = served(base, 3, MOST, host_capacity=2, disk=shelf)
    for name, part in factors.items():
        bank.put(name, part)
    assert len(bank) == 12
    assert bank.resident == ["a9", "a10", "a11"]
    assert set(shelf) == {f"a{i}" for i in range(7)}
    bank.pin("a11")
    for i in (*range(12), 3, 0, 11, 7):
        with bank.use(f"a{i}"):
            assert close_to(base(x), alone[f"a{i}"](x))
        assert "a11" in bank.resident
        assert len(bank.resident) == 3
    bank.prefetch("a1", "a2").result()
    assert {"a1", "a2", "a11"} == set(bank.resident)
    assert len(written) == len(set(written)), "what is there already is not written again"
    for name in bank.names:
        bank.remove(name)
    assert not len(bank)
    assert not bank.resident
    assert not shelf


def test_more_in_use_than_there_are_slots_is_an_error_that_changes_nothing():
    base, factors, alone = small(4)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    with pytest.raises(BankError, match="all of the 2 slots are in use"), bank.use(["a0", "a1", "a2"]):
        pass
    with bank.use(["a3", "a1", "a3"]):
        assert close_to(base(x)[1], alone["a1"](x)[1])
    full = served(Small(), 1, MOST, host_capacity=0)
    full.put("a0", factors["a0"])
    with pytest.raises(BankError, match=r"No room for 'a1'.*host_capacity"):
        full.put("a1", factors["a1"])
    assert full.resident == ["a0"]


def test_a_batch_keeps_what_it_entered_with_while_others_replace_and_remove_it():
    base, factors, alone = small(3)
    bank = served(base, 2, MOST)
    bank.put("legal", factors["a0"])
    x = torch.randn(3, 6)
    with bank.use("legal"):
        bank.put("legal", factors["a1"], replace=True)
        assert close_to(base(x), alone["a0"](x))
        with bank.use("legal"):
            assert close_to(base(x), alone["a1"](x))
        bank.remove("legal")
        assert close_to(base(x), alone["a0"](x))
        bank.put("other", factors["a2"])
        with bank.use(["other", None, "other"]):
            assert close_to(base(x)[0], alone["a2"](x)[0])
        assert close_to(base(x), alone["a0"](x))
    assert bank.names == ["other"]
    bank.put("again", factors["a1"])
    assert set(bank.resident) == {"other", "again"}


def test_threads_with_different_adapters_do_not_see_each_others():
    base, factors, alone = small(10)
    bank = served(base, 4, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    exact = {name: model(x) for name, model in alone.items()}
    wrong: list[str] = []

    def serve(thread: int) -> None:
        with torch.no_grad():
            for step in range(60):
                name = f"a{(7 * thread + 3 * step) % 9}"
                with bank.use(name):
                    for _ in range(3):
                        if not close_to(base(x), exact[name]):
                            wrong.append(name)
                if thread == 0:  # meanwhile others come and go
                    bank.put("a9", factors[f"a{step % 9}"], replace=True)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with bank.use(None):
        assert len(bank) == 10


def test_a_context_that_outlives_the_use_it_was_copied_from_is_told():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    bank.put("a0", factors["a0"])
    x = torch.randn(2, 6)
    for names in ("a0", ["a0", "a0"]):
        with bank.use(names):
            context = contextvars.copy_context()
            assert close_to(context.run(base, x), alone["a0"](x))
        with pytest.raises(AdapterStateError, match="which has ended"):
            context.run(base, x)


def test_what_one_batch_copied_is_written_over_for_the_next_only_when_nobody_reads_it():
    base, factors, alone = small(4)
    bank = served(base, 4, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(2, 6)
    with bank.use(["a0", "a1"]):
        base(x)
        with bank.use(["a2", "a3"]):
            assert close_to(base(x)[0], alone["a2"](x)[0])
        with bank.use(["a3", "a2", "a1"]):
            assert close_to(base(torch.ones(3, 6))[2], alone["a1"](torch.ones(1, 6))[0])
        assert close_to(base(x)[1], alone["a1"](x)[1])
    assert 1 <= len(bank._rooms) <= 3
    with torch.enable_grad():
        x.requires_grad_()
        with bank.use(["a0", "a1"]):
            y = base(x)
        with torch.no_grad(), bank.use(["a2", "a3"]):
            base(x)
        y.square().sum().backward()  # reads what the first batch copied
        exact = torch.autograd.grad(sum(alone[f"a{i}"](x[i]).square().sum() for i in range(2)), x)[0]
    assert close_to(x.grad, exact)


def test_folding_gives_the_adapter_at_the_bases_own_cost_and_undoes_itself_exactly():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    plain, weight = base(x), base.first.weight
    with bank.folded("a1"):
        assert close_to(base(x), alone["a1"](x))
        with bank.use("a1"):
            assert close_to(base(x), alone["a1"](x))
        with bank.use(["a1"] * 3):
            assert close_to(base(x), alone["a1"](x))
        with pytest.raises(BankError, match="'a1' is folded"), bank.use("a0"):
            pass
        with pytest.raises(BankError, match="folded into the base"):
            bank.remove("a1")
    assert base.first.weight is weight
    assert base(x).equal(plain)
    with bank.use("a0"), pytest.raises(BankError, match="'a0' is in use"), bank.folded("a1"):
        pass
    assert base(x).equal(plain)


def test_an_adapter_is_not_folded_under_a_forward_of_the_base():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    plain = base(x)
    for names in (None, [None, None, None]):
        with bank.use(names), pytest.raises(BankError, match="The bare base is in use"), bank.folded("a1"):
            pass
    inside, go_on, outputs = threading.Event(), threading.Event(), {}

    def pause(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(30)

    hook = base.first.register_forward_hook(pause)

    def run() -> None:
        with torch.no_grad():
            outputs["bare"] = base(x)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(BankError, match="runs in another thread"), bank.folded("a1"):
        pass
    assert base(x).equal(plain)
    go_on.set()
    thread.join()
    assert outputs["bare"].equal(plain)
    hook.remove()
    with bank.folded("a1"):
        assert close_to(base(x), alone["a1"](x))


def test_threads_get_a_folded_adapter_where_they_use_it_and_an_error_where_they_do_not():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    plain = base(x)
    folded, left, results = threading.Event(), threading.Event(), []

    def run() -> None:
        assert folded.wait(30)
        with torch.no_grad():
            for names in ("a1", ["a1"] * 3):
                with bank.use(names):
                    results.append(close_to(base(x), alone["a1"](x)))
            for names in (None, "a0", ["a1", None, "a1"], [None] * 3):
                with pytest.raises(BankError, match="'a1' is folded into the base"), bank.use(names):
                    pass
            with pytest.raises(AdapterStateError, match=r"'a1' was folded .* enter `with bank\.use\('a1'\):` here"):
                base(x)
            use = bank.use("a1")
            with use:
                results.append(True)
                left.set()
                assert ended.wait(30)
                with pytest.raises(AdapterStateError, match="is not folded any more"):
                    base(x)
            results.append(base(x).equal(plain))

    ended = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    with bank.folded("a1"):
        folded.set()
        assert left.wait(30)
        with pytest.raises(BankError, match="'a1' is folded into the base"), bank.use(None):
            pass
    ended.set()
    thread.join()
    assert results == [True] * 4
    assert base(x).equal(plain)


def test_whoever_computes_while_adapters_are_folded_gets_what_was_asked_for_or_an_error():
    base, factors, alone = small(2)
    bank = served(base, 2, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6)
    exact = {None: base(x), "a0": alone["a0"](x), "a1": alone["a1"](x)}
    wrong: list[object] = []
    served_names: set[str | None] = set()
    done = threading.Event()

    def serve(kind: int) -> None:
        names = (None, "a0", "a1", None)
        with torch.no_grad():
            while not done.wait(0.001):  # time for others in between
                name = names[kind]
                try:
                    if kind == 0:
                        y = base(x)
                    else:
                        with bank.use(name):
                            y = base(x)
                except (BankError, AdapterStateError):
                    continue
                served_names.add(name)
                if not close_to(y, exact[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(kind,)) for kind in range(4)]
    for thread in threads:
        thread.start()
    folds = 0
    try:
        while folds < 20 or len(served_names) < 3:
            try:
                with bank.folded("a1"):
                    folds += 1
                    if not close_to(base(x), exact["a1"]):
                        wrong.append("folded")
            except BankError:
                pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert served_names == {None, "a0", "a1"}
    assert base(x).equal(exact[None])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_has_slots_of_its_own():
    base, factors, alone = small(3)
    bank = served(base, 2, MOST)
    bank.put("legal", factors["a0"])
    bank.prefetch("legal").result()
    x = torch.randn(3, 6)
    child = os.fork()
    if not child:
        bank.put("legal", factors["a1"], replace=True)
        bank.put("other", factors["a2"])
        bank.prefetch("other").result(timeout=30)
        with torch.no_grad(), bank.use(["legal", "other", None]):
            y = base(x)
        os._exit(0 if close_to(y[1], alone["a2"](x)[1]) and close_to(y[0], alone["a1"](x)[0]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    with bank.use("legal"):
        assert close_to(base(x), alone["a0"](x))
    bank.put("more", factors["a1"])  # into the slot that the child has filled in its own memory
    with bank.use("more"):
        assert close_to(base(x), alone["a1"](x))


def test_a_model_on_two_devices_is_refused_by_name():
    base = Small()
    base.second.to("meta")
    with pytest.raises(BankError, match=r"'first' on cpu, 'second' on meta.*target_modules"):
        served(base)
    assert type(base.first) is nn.Linear
    bank = Bank(base, target_modules=["first"])  # what it serves is on one
    bank.close()
    base = Small()
    bank = served(base)
    base.first.to("meta")
    with pytest.raises(BankError, match="several devices"):
        bank.use("a").__enter__()


def test_bad_input_is_named_and_changes_nothing():
    base, factors, _ = small(2)
    bank = served(base, 2, MOST)
    bank.put("legal", factors["a0"])
    good = factors["a1"]["first"]
    with pytest.raises(BankError, match=r"no adapter 'legl'\. Did you mean 'legal'"), bank.use("legl"):
        pass
    with pytest.raises(BankError, match="no adapter 'code'"), bank.use(["legal", "code"]):
        pass
    with pytest.raises(BankError, match="empty list"), bank.use([]):
        pass
    use = bank.use("legal")
    with use, pytest.raises(BankError, match="entered already"), use:
        pass
    with pytest.raises(BankError, match="already"):
        bank.put("legal", factors["a1"])
    with pytest.raises(AdapterFormatError, match=r"it adapts third, which this bank does not serve.*'third'"):
        bank.put("x", {"third": good})
    with pytest.raises(AdapterFormatError, match=r"rank 5.*max_rank=4"):
        bank.put("x", {"first": LayerFactors(torch.ones(5, 6), torch.ones(8, 5), 1.0)})
    with pytest.raises(AdapterFormatError, match=r"B of shape \(8, 3\) where the model has \(8, 2\)"):
        bank.put("x", {"first": LayerFactors(torch.ones(2, 6), torch.ones(8, 3), 1.0)})
    with pytest.raises(AdapterFormatError, match="not finite"):
        bank.put("x", {"first": LayerFactors(good.A, good.B * float("nan"), 1.0)})
    with pytest.raises(AdapterFormatError, match="adapts nothing"):
        bank.put("x", {})
    with bank.use(["legal", None]), pytest.raises(AdapterStateError, match=r"given 2 rows, and 'first'.*\(3, 6\)"):
        base(torch.randn(3, 6))
    with pytest.raises(AdapterStateError, match="close"):
        copy.deepcopy(base)
    with pytest.raises(AdapterStateError, match="cannot be copied or pickled"):
        pickle.dumps(bank)
    assert bank.names == ["legal"]
    assert len(bank._slots._free) == 1


def test_a_model_that_cannot_be_served_is_refused_before_anything_is_changed():
    adapted = Small()
    inject(adapted, LoRAConfig(rank=2))
    with pytest.raises(AdapterStateError, match="has adapters already"):
        Bank(adapted)
    base = Small()
    bank = Bank(base)
    with pytest.raises(AdapterStateError, match="A bank serves first"):
        Bank(base)
    with bank.use(None), pytest.raises(ConfigError, match="capacity is a whole number from 1 on, not 0"):
        Bank(Small(), 0)
    with pytest.raises(BankError, match="does not fit"):
        Bank(Small(), 10**12)
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    with pytest.raises(TargetError, match="fast path"):
        Bank(encoder, target_modules=["linear1"])
    with pytest.raises(TargetError, match="out_proj"):
        Bank(encoder, target_modules=["out_proj"])
    assert type(encoder.linear1) is nn.Linear


def test_the_plan_is_what_is_taken():
    base, _, _ = small(1)
    told = Bank.plan_for(base, 5, max_rank=MOST, target_modules=["first", "second"])
    assert type(base.first) is nn.Linear
    bank = served(base, 5, MOST)
    assert bank.plan == told
    assert bank.plan.bytes == bank._slots.slab.data.nbytes
    # A and B of rank 4 for 6 x 8 and 8 x 4, a gain and a shift for each output
    assert bank.plan.bytes_per_adapter == 4 * (4 * (6 + 8) + 2 * 8 + 4 * (8 + 4) + 2 * 4)
    assert str(bank.plan).startswith("5 slots of 512 bytes (2 layers, rank up to 4, float32): 3 KiB on cpu")


def test_what_is_added_and_removed_for_long_takes_no_more_memory():
    base, factors, alone = small(6)
    bank = served(base, 2, MOST, host_capacity=2)
    x = torch.randn(2, 6)
    for step in range(300):
        name = f"a{step % 6}"
        if len(bank) == 4:
            bank.remove(bank.names[step % 4])
        bank.put(f"{step}", factors[name])
        with bank.use([f"{step}", None]):
            assert close_to(base(x)[0], alone[name](x)[0])
    assert len(bank._slots._free) + len(bank.resident) == 2
    assert len(bank._slots.store) + len(bank.resident) == len(bank)


def _layers() -> dict[str, LayerFactors]:
    """For two layers of one shape, one of another, and one that shares its A's shape with the first two."""
    torch.manual_seed(0)
    sizes = {"0": (6, 6), "1": (6, 6), "2": (6, 4), "3": (4, 6)}
    return {n: LayerFactors(torch.randn(3, i), torch.randn(o, 3), 1.7) for n, (i, o) in sizes.items()}


def _changed(name: str, **changes: object) -> dict[str, LayerFactors]:
    layers = _layers()
    return {**layers, name: replace(layers[name], **changes)}  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_rank", [3, 5])
@pytest.mark.parametrize(
    "factors",
    [
        _layers(),
        {name: values for name, values in _layers().items() if name != "1"},
        _changed("1", A=torch.randn(2, 6), B=torch.randn(6, 2)),
        _changed("1", A=torch.randn(3, 6, dtype=torch.float64)),
        _changed("2", B=torch.randn(4, 3).half()),
        _changed("0", scale=0.3),
        _changed("0", bias=torch.randn(6)),
        _changed("3", A=torch.randn(4, 3).T, B=torch.randn(3, 6).T),
    ],
    ids=["whole", "a layer less", "ranks", "precisions of A", "of B", "scales", "a bias", "views"],
)
def test_a_slot_holds_what_was_put_whether_its_layers_come_in_whole_blocks_or_not(
    factors: dict[str, LayerFactors], max_rank: int, dtype: torch.dtype
) -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6))
    bank = Bank(base, 2, max_rank=max_rank, target_modules=r"\d", dtype=dtype)
    bank.put("before", _layers())
    bank.put("x", factors)
    for name, cell in bank._cells.items():
        A, B = (t[bank._slots.entries["x"].slot] for t in (cell.A, cell.B))
        values = factors.get(name)
        rank = 0 if values is None else values.A.shape[0]
        assert not A[rank:].any()
        assert not B[rank:].any()
        if values is not None:
            scaled = values.B.T.to(torch.promote_types(values.B.dtype, dtype)) * values.scale
            assert A[:rank].equal(values.A.to(dtype))
            assert B[:rank].equal(scaled.to(dtype))


def test_a_layer_that_no_adapter_can_be_trained_for_is_refused_and_a_computed_weight_served():
    class Placed(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:  # as learned positions in transformers: not the ids that come in
            return super().forward(torch.arange(x.shape[1]).expand(x.shape))

    for layer, match in (
        (Placed(9, 4), r"'layer' \(Placed\): its class has a forward of its own"),
        (nn.Embedding(9, 4, max_norm=1.0), r"'layer' \(Embedding\): an embedding with max_norm"),
    ):
        model = nn.ModuleDict({"layer": layer})
        with pytest.raises(TargetError, match=match):
            Bank(model, target_modules=["layer"])
        assert "bank_cell" not in vars(layer)
    base, factors, alone = small(1)
    for layer in base.children():
        nn.utils.parametrizations.weight_norm(layer)
    bank = served(base, 1, MOST)
    bank.put("a0", factors["a0"])
    x = torch.randn(2, 6)
    with bank.use("a0"):
        assert close_to(base(x), alone["a0"](x))
    with pytest.raises(AdapterStateError, match="DoRA and folding need its numbers"), bank.folded("a0"):
        pass
    bank.close()


@pytest.mark.parametrize("host_capacity", [0, 1, 2])
def test_a_store_that_is_full_serves_all_that_it_has_written(host_capacity: int) -> None:
    class Shelf(dict[str, Tensor]):
        room = 100

        def put(self, name: str, row: Tensor) -> None:
            if len(self) >= self.room:
                raise BankError("no space left")
            self[name] = row.clone()

        def take(self, name: str) -> Tensor:
            return self[name]

        def drop(self, name: str) -> None:
            del self[name]

    base, factors, alone = small(9)
    shelf, x = Shelf(), torch.randn(3, 6)
    bank = served(base, 3, MOST, host_capacity=host_capacity, disk=shelf)
    names = list(factors)
    for name in names[:8]:
        bank.put(name, factors[name])
    Shelf.room = len(shelf)
    with pytest.raises(BankError, match="no space left"):
        bank.put(names[8], factors[names[8]])
    for order in (names[:8], names[7::-1], names[:8:2] + names[1:8:2]) * 2:
        for name in order:
            with bank.use(name):
                assert close_to(base(x), alone[name](x)), name
    assert len(bank._slots.store) <= host_capacity + 3  # at most what had slots waits besides
    Shelf.room = 100  # and goes where it belongs once there is room again
    for name in names[:8] * 2:
        with bank.use(name):
            assert close_to(base(x), alone[name](x)), name
    assert len(bank._slots.store) <= max(host_capacity, 0)
    bank.put(names[8], factors[names[8]])


@torch.no_grad()
def test_the_plan_counts_the_copies_that_are_kept_beside_the_slots() -> None:
    base, factors, _ = small(4)
    bank = served(base, 4, MOST, dtype=torch.float64)
    for name in factors:
        bank.put(name, factors[name])
    assert bank.plan.copies == 0
    assert "copies" not in str(bank.plan)
    for name in factors:
        with bank.use(name):
            base(torch.randn(3, 6))
    kept = [t for e in bank._slots.entries.values() for f in e.one._factors.values() for t in f]
    assert bank.plan.copies == sum(t.nbytes for t in kept) > 0
    assert "of copies" in str(bank.plan)
    bank.remove(next(iter(factors)))
    assert bank.plan.copies < sum(t.nbytes for t in kept)
    before = bank.plan.copies
    with bank.use([*list(factors)[1:3], None]):
        base(torch.randn(3, 6))
    assert bank.plan.copies > before  # the memory that a batch copied its adapters into, which the next one uses
