from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_lora import LoRACallback, LoRAConfig, inject
from lightning_lora.engine import adapters
from lightning_lora.engine.optim import fit_optimizers, lora_plus
from lightning_lora.errors import ConfigError, TrainingError

from .lit import Lit, net, trainer

LR = 0.01


def held(optimizers: list[Optimizer]) -> set[int]:
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}


def wanted(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters() if p.requires_grad}


def decay_groups(m: nn.Module) -> list[dict[str, Any]]:
    named = list(m.named_parameters())
    return [
        {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": 0.1},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]


SHAPES: dict[str, Callable[[Lit], Any]] = {
    "all": lambda m: AdamW(m.parameters(), lr=LR),
    "filtered": lambda m: AdamW([p for p in m.parameters() if p.requires_grad], lr=LR),
    "named": lambda m: AdamW(m.named_parameters(), lr=LR),
    "decay groups": lambda m: AdamW(decay_groups(m), lr=LR),
    "layer groups": lambda m: SGD([{"params": m.net[i].parameters(), "lr": LR * (i + 1)} for i in (0, 3, 5)], lr=LR),
    "eager state": lambda m: Adagrad(m.parameters(), lr=LR),
    "fused": lambda m: Adam(m.parameters(), lr=LR, fused=True),
    "tensor lr": lambda m: Adam(m.parameters(), lr=torch.tensor(LR), foreach=False),
    "matrices": lambda m: Muon([p for p in m.parameters() if p.ndim == 2 and p.requires_grad], lr=LR),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=LR),
    "list": lambda m: [AdamW(m.parameters(), lr=LR)],
    "dict": lambda m: {"optimizer": (o := AdamW(m.parameters(), lr=LR)), "lr_scheduler": schedulers.StepLR(o, 1)},
    "lambda per group": lambda m: _scheduled(m, lambda o: schedulers.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.5**e])),
    "one cycle": lambda m: _scheduled(m, lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=10)),
    "plateau": lambda m: (
        [o := AdamW(decay_groups(m), lr=LR)],
        [{"scheduler": schedulers.ReduceLROnPlateau(o, min_lr=[1e-4, 1e-5]), "monitor": "val_loss"}],
    ),
}


def _scheduled(m: nn.Module, scheduler: Callable[[Optimizer], Any]) -> Any:
    optimizer = AdamW(decay_groups(m), lr=LR)
    return [optimizer], [scheduler(optimizer)]


@pytest.mark.parametrize("ratio", [None, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_configure_optimizers_returns_trains_adapters_alone(shape: str, ratio: float | None) -> None:
    class Module(Lit):
        def configure_optimizers(self) -> Any:
            return SHAPES[shape](self)

    module = Module()
    run = trainer(LoRACallback(rank=2, lora_plus_ratio=ratio), max_epochs=2)
    if shape == "lbfgs" and ratio:
        with pytest.raises(TrainingError, match="LBFGS"):
            run.fit(module)
        return
    groups: list[int] = []
    module.on_train_start = lambda: groups.append(len(run.optimizers[0].param_groups))  # type: ignore[method-assign]
    run.fit(module)
    assert held(run.optimizers) == wanted(module)
    assert len(wanted(module)) == 4
    assert groups == [len(run.optimizers[0].param_groups)]
    assert all(bool(m.lora_B.abs().sum() > 0) for _, m in adapters(module))


@pytest.mark.parametrize("make", [SGD, AdamW, Adagrad])
def test_an_optimizer_made_before_injection_gets_each_layers_factors_in_its_place(make: type[Optimizer]) -> None:
    module = net()
    optimizer = make(
        [{"params": [module[0].weight], "lr": 0.1}, {"params": [module[3].weight, module[3].bias], "lr": 0.2}],
        lr=0.3,  # type: ignore[call-arg]
    )
    inject(module, LoRAConfig(rank=2))
    report = fit_optimizers([optimizer], module)
    by_lr = {group["lr"]: [id(p) for p in group["params"]] for group in optimizer.param_groups}
    assert by_lr == {
        0.1: [id(module[0].lora_A), id(module[0].lora_B)],
        0.2: [id(module[3].lora_A), id(module[3].lora_B)],
    }
    assert (report.trained, report.replaced, report.dropped, report.added) == (4, 2, 1, 0)
    assert all(id(p) in wanted(module) for p in optimizer.state)
    module(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert module[0].lora_B.abs().sum() > 0


def test_factors_in_no_group_join_the_first_with_a_warning() -> None:
    module = net()
    inject(module, LoRAConfig(rank=2, modules_to_save=["5"]))
    optimizer = SGD(module[5].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"was not given 0.lora_A, 0.lora_B, 3.lora_A, 3.lora_B: they join its"):
        report = fit_optimizers([optimizer], module)
    assert held([optimizer]) == wanted(module)
    assert report.added == 4


@pytest.mark.parametrize("count", [0, 2])
def test_factors_that_no_optimizer_would_train_are_an_error(count: int) -> None:
    module = net()
    inject(module, LoRAConfig(rank=2, modules_to_save=["5"]))
    optimizers = [SGD([p], lr=0.1) for p in list(module[5].parameters())[:count]]
    before = [held([o]) for o in optimizers]
    with pytest.raises(TrainingError, match=r"No optimizer trains 0\.lora_A"):
        fit_optimizers(optimizers, module)
    assert [held([o]) for o in optimizers] == before


def test_several_optimizers_each_keep_their_own() -> None:
    module = net()
    inject(module, LoRAConfig(rank=2))
    optimizers = [SGD(module[0].parameters(), lr=0.1), SGD(module[3].parameters(), lr=0.2)]
    fit_optimizers(optimizers, module)
    assert [held([o]) for o in optimizers] == [{id(module[i].lora_A), id(module[i].lora_B)} for i in (0, 3)]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=LR, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=LR),
    "fused": lambda p: Adam(p, lr=LR, fused=True),
    "adagrad": lambda p: Adagrad(p, lr=LR),
    "amsgrad": lambda p: AdamW(p, lr=LR, amsgrad=True),
}
SCHEDULERS: dict[str, Callable[[Optimizer, int], Any]] = {
    "none": lambda o, n: None,
    "cosine": lambda o, n: schedulers.CosineAnnealingLR(o, 10),
    "lambda": lambda o, n: schedulers.LambdaLR(o, lambda e: 0.9**e),
    "warm-up": lambda o, n: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lora_plus_is_bit_for_bit_a_group_of_its_own_for_b(optimizer: str, scheduler: str, with_closure: bool) -> None:
    """Against the same optimizer with explicit groups, whose B group starts at ratio times the learning rate."""
    ratio = 8.0
    x = torch.randn(6, 8)

    def run(explicit: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        module = net().eval()
        inject(module, LoRAConfig(rank=2))
        if explicit:
            layers = [m for _, m in adapters(module)]
            groups = [{"params": [m.lora_A for m in layers]}, {"params": [m.lora_B for m in layers], "lr": LR * ratio}]
            opt = OPTIMIZERS[optimizer](groups)
        else:
            opt = OPTIMIZERS[optimizer](module.parameters())
            fit_optimizers([opt], module)
            lora_plus(opt, module, ratio)
        schedule = SCHEDULERS[scheduler](opt, len(opt.param_groups))

        def closure() -> torch.Tensor:
            if not explicit:
                assert len(opt.param_groups) == 1, "training_step, which runs in here, sees the groups as they are"
            opt.zero_grad()
            loss = module(x).square().sum()
            loss.backward()
            return loss

        for _ in range(8):
            if with_closure:
                opt.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                opt.step()
            if schedule is not None:
                schedule.step()
        return [p.detach() for p in module.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False)))


def test_a_step_that_raises_leaves_no_scaled_group_in_the_state_dict() -> None:
    module = net()
    inject(module, LoRAConfig(rank=2))

    class Failing(SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            raise ValueError

    optimizer = Failing([p for p in module.parameters() if p.requires_grad], lr=LR)
    lora_plus(optimizer, module, 4.0)
    with pytest.raises(ValueError):
        optimizer.step()
    assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [LR]
    assert len(optimizer.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf"), "4", True])
def test_a_ratio_that_cannot_be_is_an_error(ratio: Any) -> None:
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        LoRACallback(lora_plus_ratio=ratio)


def test_a_weight_of_the_base_that_joins_an_optimizer_later_is_an_error_before_it_is_trained() -> None:
    class Unfreezes(Lit):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[0].weight.requires_grad_(True)
                self.optimizers().optimizer.add_param_group({"params": [self.net[0].weight], "lr": 1.0})

    module = Unfreezes()
    before = module.net[0].weight.detach().clone()
    with pytest.raises(TrainingError, match=r"net\.0\.weight came into an optimizer while training went on"):
        trainer(LoRACallback(rank=2), max_epochs=3).fit(module)
    assert torch.equal(module.net.get_parameter("0.weight"), before)


def test_backbone_finetuning_beside_adapters_is_an_error() -> None:
    class Parts(Lit):
        def build(self, seed: int) -> None:
            whole = net(seed)
            self.backbone, self.net = whole[:5], nn.Sequential(whole[5])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.backbone(x))

    callbacks = [LoRACallback(rank=2, target_modules=["net.0"]), BackboneFinetuning(unfreeze_backbone_at_epoch=1)]
    with pytest.raises(TrainingError, match=r"backbone\.0\.weight.* came into an optimizer.*BackboneFinetuning"):
        trainer(*callbacks, max_epochs=3).fit(Parts())


def test_a_base_that_is_unfrozen_when_training_starts_is_named_once() -> None:
    class Unfreezes(Lit):
        def on_train_start(self) -> None:
            self.unfreeze()

    with pytest.warns(UserWarning, match=r"net\.0\.weight.* was frozen, and requires grad again") as said:
        trainer(LoRACallback(rank=2), max_epochs=2).fit(Unfreezes())
    assert sum("requires grad again" in str(w.message) for w in said) == 1


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_product_decay_keeps_the_updates_small_in_a_run(ratio: float | None) -> None:
    def size(decay: float | None) -> float:
        pl.seed_everything(1, verbose=False)
        module = Lit()
        callback = LoRACallback(rank=2, lora_plus_ratio=ratio, product_decay=decay)
        trainer(callback, max_epochs=3, accumulate_grad_batches=2).fit(module)
        return sum(float(m.delta_weight().detach().square().sum()) for _, m in adapters(module))

    assert size(0.5) < 0.5 * size(1e-9)
    assert size(1e-9) == pytest.approx(size(None), rel=1e-4)


@pytest.mark.parametrize("strength", [0, -1, float("nan"), True])
def test_a_product_decay_that_cannot_be_is_refused(strength: Any) -> None:
    with pytest.raises(ConfigError, match="product_decay is a finite number above 0"):
        LoRACallback(product_decay=strength)


def test_a_callback_that_freezes_what_was_adapted_says_what_it_means(tmp_path):
    class Split(Lit):
        def build(self, seed):
            self.backbone, self.head = net(seed), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.backbone(x))

    for config in ({}, {"modules_to_save": ["head"]}):
        callbacks = [LoRACallback(rank=2, **config), BackboneFinetuning(unfreeze_backbone_at_epoch=1)]
        with pytest.raises(TrainingError, match=r"BackboneFinetuning has frozen backbone\.0\.lora_A.* Leave it out"):
            trainer(*callbacks, max_epochs=3).fit(Split())
