"""LoRA+ under optimizers that keep numbers in their groups, or hold another optimizer: as one made with two groups.

The optimizers here behave as those of the packages schedulefree, pytorch_optimizer, timm and transformers do.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_lora import LoRAConfig, inject
from lightning_lora.engine.layers import adapters
from lightning_lora.engine.optim import fit_optimizers, lora_plus
from lightning_lora.engine.product_decay import product_decay
from lightning_lora.errors import TrainingError

LR, RATIO = 1e-2, 8.0


class ScheduleFree(Optimizer):
    """As schedulefree.SGDScheduleFree: sums of weights, the largest rate and a mode lie in the groups."""

    def __init__(self, params: Any, lr: float) -> None:
        numbers = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": False, "beta": 0.9, "warmup": 3}
        super().__init__(params, dict(lr=lr, **numbers))

    @torch.no_grad()
    def switch(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - group["beta"] if train else 1 - 1 / group["beta"])
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert all(group["train_mode"] for group in self.param_groups)
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            lr = group["lr"] * min(1.0, (group["k"] + 1) / group["warmup"])
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share).add_(p.grad, alpha=lr * (group["beta"] * (1 - share) - 1))
                z.sub_(p.grad, alpha=lr)
            group["k"] += 1
        return loss


class OwnRate(Optimizer):
    """Lowers its rate in each step, divides by the first one, and keeps a list in its groups that grows in place."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["rates"] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            group["rates"].append(group["lr"])
            for p in group["params"]:
                p.mul_(1 - 0.1 * group["lr"] / group["initial_lr"])
                p.sub_(p.grad, alpha=sum(group["rates"]) / len(group["rates"]))
            group["lr"] *= 0.9
        return loss


class SAM(Optimizer):
    """As the usual one: the inner optimizer shares its groups."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"rho": 0.05, "lr": lr})
        self.base_optimizer = SGD(self.groups_of_base(), lr=lr, momentum=0.9)
        self.share()

    def groups_of_base(self) -> Any:
        return self.param_groups

    def share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=group["rho"] / float(norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss


class SAMOfOwnGroups(SAM):
    """The inner optimizer has group dicts of its own."""

    def groups_of_base(self) -> Any:
        return [dict(group) for group in self.param_groups]

    def share(self) -> None: ...


class Lookahead(Optimizer):
    """As pytorch_optimizer's: made without Optimizer.__init__, with the hooks that steps need."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.state, self.defaults = inner, {}, inner.defaults  # type: ignore[assignment]
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()
        for group in self.param_groups:
            group["counter"] = 0
            self.state |= {p: p.detach().clone() for p in group["params"]}

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                group["counter"] = (group["counter"] + 1) % 3
                for p in group["params"] if group["counter"] == 0 else ():
                    self.state[p].lerp_(p, 0.5)
                    p.copy_(self.state[p])
        return loss

    def state_dict(self) -> Any:
        return {"inner": self.inner.state_dict(), "slow": list(self.state.values())}

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.state = dict(zip(self.state, state_dict["slow"]))


class Foreign(Lookahead):
    """As timm's Lookahead: its step calls no hooks."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults


class Listed(SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.flat = [list(group["params"]) for group in self.param_groups]


Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "schedule-free": lambda groups: ScheduleFree(groups, LR),
    "own rate": lambda groups: OwnRate(groups, LR),
    "sam": lambda groups: SAM(groups, LR),
    "sam of own groups": lambda groups: SAMOfOwnGroups(groups, LR),
    "lookahead": lambda groups: Lookahead(AdamW(groups, lr=LR)),
    "lookahead around schedule-free": lambda groups: Lookahead(ScheduleFree(groups, LR)),
}


class Run:
    """A small training of two adapted layers, with groups that are explicit or LoRA+'s."""

    def __init__(self, make: Make, *, explicit: bool) -> None:
        torch.manual_seed(1)
        self.make, self.explicit = make, explicit
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.x = torch.randn(6, 8)
        inject(self.net, LoRAConfig(rank=2, target_modules=["0", "2"]))
        self.layers: list[Any] = [m for _, m in adapters(self.net)]
        self.optimizer = self.made()

    def made(self) -> Optimizer:
        if self.explicit:
            groups = [
                {"params": [m.lora_A for m in self.layers]},
                {"params": [m.lora_B for m in self.layers], "lr": LR * RATIO},
            ]
            return self.make(groups)
        optimizer = self.make([{"params": [p for m in self.layers for p in (m.lora_A, m.lora_B)]}])
        lora_plus(optimizer, self.net, RATIO)
        return optimizer

    def closure(self) -> Tensor:
        assert len(self.optimizer.param_groups) == (2 if self.explicit else 1)
        self.optimizer.zero_grad()
        loss = self.net(self.x).square().mean()
        loss.backward()
        return loss

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.switch(True)
            self.optimizer.step(self.closure)  # type: ignore[arg-type]
            self.switch(False)
        return self

    def switch(self, train: bool) -> None:
        inner = getattr(self.optimizer, "inner", self.optimizer)
        if isinstance(inner, ScheduleFree):
            inner.switch(train)

    def resumed(self) -> Run:
        saved = copy.deepcopy(self.optimizer.state_dict())
        self.optimizer = self.made()
        self.optimizer.load_state_dict(saved)
        return self

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for m in self.layers for p in (m.lora_A, m.lora_B)]


def equal(one: Run, other: Run) -> bool:
    assert all(bool(value.isfinite().all()) for value in one.values())
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_b_trains_bit_for_bit_as_in_an_optimizer_made_with_a_group_for_it(name: str) -> None:
    explicit = Run(OPTIMIZERS[name], explicit=True).steps(9)
    run = Run(OPTIMIZERS[name], explicit=False).steps(9)
    assert equal(explicit, run)
    of_b, of_a = explicit.optimizer.param_groups[1], explicit.optimizer.param_groups[0]
    (group,) = run.optimizer.param_groups
    own = group.get("lora_plus", {})
    for key in of_a.keys() - {"params", "lr", "initial_lr"}:
        assert group[key] == of_a[key], f"{key} advances as in the group of A"
        assert (own[key][1] if key in own else group[key]) == of_b[key], f"{key} of B is kept beside it"


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "sam" not in name])
def test_what_b_counts_by_itself_survives_a_state_dict(name: str) -> None:
    straight = Run(OPTIMIZERS[name], explicit=False).steps(9)
    assert equal(straight, Run(OPTIMIZERS[name], explicit=False).steps(4).resumed().steps(5))


def test_an_optimizer_without_numbers_of_its_own_has_the_state_dict_that_it_always_had() -> None:
    run = Run(lambda groups: AdamW(groups, lr=LR), explicit=False).steps(3)
    plain = AdamW([torch.zeros(1)], lr=LR)
    assert run.optimizer.state_dict()["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()


@pytest.mark.parametrize("name", ["sam", "sam of own groups"])
def test_steps_that_are_taken_half_by_half_give_b_its_rate(name: str) -> None:
    def run(explicit: bool) -> Run:
        one = Run(OPTIMIZERS[name], explicit=explicit)
        optimizer: Any = one.optimizer
        for _ in range(4):
            one.closure()
            optimizer.first_step()
            one.closure()
            optimizer.second_step()
        return one

    assert equal(run(True), run(False))


def test_a_rate_that_the_user_sets_between_steps_is_obeyed_where_the_optimizer_sets_it_too() -> None:
    runs = [Run(OPTIMIZERS["own rate"], explicit=explicit).steps(3) for explicit in (True, False)]
    for run in runs:
        for group, factor in zip(run.optimizer.param_groups, (1.0, RATIO)):
            group["lr"] = 0.003 * factor
        run.steps(3)
    assert equal(*runs)


def test_a_group_of_b_alone_gets_the_rate_and_keeps_its_own_numbers() -> None:
    def run(explicit: bool) -> tuple[Run, Optimizer]:
        one = Run(OPTIMIZERS["schedule-free"], explicit=True)
        rate = LR * RATIO if explicit else LR
        groups = [{"params": [m.lora_A for m in one.layers]}, {"params": [m.lora_B for m in one.layers], "lr": rate}]
        one.optimizer = ScheduleFree(groups, LR)
        if not explicit:
            lora_plus(one.optimizer, one.net, RATIO)
        return one.steps(5), one.optimizer

    (by_hand, theirs), (plus, ours) = run(True), run(False)
    assert equal(by_hand, plus)
    assert ours.param_groups[1]["weight_sum"] == theirs.param_groups[1]["weight_sum"]
    assert ours.param_groups[1]["lr"] == LR


def test_a_state_dict_loads_after_a_step_that_raised() -> None:
    run = Run(OPTIMIZERS["schedule-free"], explicit=False).steps(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.layers[0].lora_A.grad = None
    run.switch(True)
    with pytest.raises(TypeError):
        run.optimizer.step()  # a gradient is missing
    run.optimizer.load_state_dict(saved)
    assert len(run.optimizer.param_groups) == 1
    assert len(run.optimizer.param_groups[0]["params"]) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda groups: Foreign(SGD(groups, lr=LR)),
            r"Foreign does not call the hooks.*give the optimizer",
        ),
        (lambda groups: Listed(groups, lr=LR), r"Listed: it keeps a list of tensors beside its groups \(flat\)"),
        (lambda groups: Lookahead(Listed(groups, lr=LR)), r"Listed: it keeps a list of tensors"),
        (lambda groups: SGD([{**group, "lr": None} for group in groups], lr=LR), r"SGD sets its own .*lr=None"),
        (lambda groups: SGD([{**group, "relative_step": True} for group in groups], lr=LR), r"relative_step=True"),
    ],
)
def test_an_optimizer_that_would_not_use_a_group_for_b_is_refused(make: Make, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Run(make, explicit=False)


def test_product_decay_follows_the_steps_of_the_inner_optimizer() -> None:
    run = Run(OPTIMIZERS["sam"], explicit=True)
    product_decay(run.optimizer, run.net, 0.5)
    optimizer: Any = run.optimizer
    for _ in range(3):
        run.closure()
        optimizer.first_step()
        run.closure()
        optimizer.second_step()
    assert not equal(run, Run(OPTIMIZERS["sam"], explicit=True).steps(3))
    assert equal(run, _with_decay(Run(OPTIMIZERS["sam"], explicit=True)).steps(3))


def test_product_decay_refuses_an_optimizer_whose_steps_it_would_not_see() -> None:
    class Foreign(Optimizer):
        def __init__(self) -> None: ...

        def step(self, closure: Any = None) -> Any: ...

    with pytest.raises(TrainingError, match=r"Foreign does not call the hooks.* product_decay, which"):
        product_decay(Foreign(), nn.Linear(2, 2), 0.5)


def _with_decay(run: Run) -> Run:
    product_decay(run.optimizer, run.net, 0.5)
    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_given_again_has_the_rate_once(name: str) -> None:
    run = Run(OPTIMIZERS[name], explicit=False)
    for _ in range(2):
        lora_plus(run.optimizer, run.net, RATIO)
    assert equal(Run(OPTIMIZERS[name], explicit=True).steps(3), run.steps(3))


@pytest.mark.parametrize("name", ["sam", "lookahead"])
def test_a_run_without_lora_plus_takes_it_off_an_optimizer_of_a_run_before(name: str) -> None:
    run, plain = Run(OPTIMIZERS[name], explicit=False), Run(OPTIMIZERS[name], explicit=False)
    product_decay(run.optimizer, run.net, 0.5)
    for one in (run, plain):
        fit_optimizers([one.optimizer], one.net)
    assert equal(run.steps(3), plain.steps(3))
    assert not equal(run, Run(OPTIMIZERS[name], explicit=False).steps(3))


def test_a_product_decay_that_is_given_again_decays_once() -> None:
    once, twice = (Run(OPTIMIZERS["sam"], explicit=True) for _ in range(2))
    for run in (once, twice, twice):
        product_decay(run.optimizer, run.net, 0.5)
    assert equal(once.steps(3), twice.steps(3))


@pytest.mark.parametrize("make", [SAM, SAMOfOwnGroups])
@pytest.mark.parametrize("held", ["all", "none of the layers"])
def test_an_inner_optimizer_that_was_made_before_injection_trains_the_adapters(make: Any, held: str) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    scale = nn.Parameter(torch.ones(()))
    optimizer = make([*net.parameters()] if held == "all" else [scale], LR)
    inject(net, LoRAConfig(rank=2, target_modules=["0", "2"]))
    if held == "all":
        fit_optimizers([optimizer], net)
    else:
        with pytest.warns(UserWarning, match="join its first group"):
            fit_optimizers([optimizer], net)
    x = torch.randn(6, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) * scale).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert all(bool(m.lora_B.any()) for _, m in adapters(net))


def test_a_wrapper_that_noted_its_parameters_before_injection_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    optimizer = Lookahead(SGD(net.parameters(), lr=LR))
    inject(net, LoRAConfig(rank=2, target_modules=["0", "2"]))
    with pytest.raises(TrainingError, match="Lookahead made the state of its parameters before"):
        fit_optimizers([optimizer], net)
