"""A reference that its module froze is left as it is by a whole training, wherever the module froze it."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora import LoRACallback
from lightning_lora.errors import AdapterStateError

from .lit import Lit, net, trainer


class Distilled(Lit):
    def __init__(self, frozen_in: str = "__init__") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.frozen_in, self.teacher = frozen_in, net(1)
        self.freeze("__init__")

    def freeze(self, hook: str) -> None:
        if hook == self.frozen_in:
            self.teacher.requires_grad_(False)

    def configure_model(self) -> None:
        self.freeze("configure_model")

    def setup(self, stage: str) -> None:
        self.freeze("setup")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(self(x), self.teacher(x).detach())


@pytest.mark.parametrize("hook", ["__init__", "configure_model", "setup"])
def test_a_teacher_that_is_frozen_anywhere_before_training_has_no_adapters(hook: str) -> None:
    module = Distilled(hook)
    callback = LoRACallback(rank=2)
    before = {name: p.clone() for name, p in module.teacher.named_parameters()}
    trainer(callback, max_epochs=1).fit(module)
    assert callback.report is not None
    assert list(callback.report.left_out) == ["teacher"]
    assert {m.name for m in callback.report.modules} == {"net.0", "net.3"}
    after = dict(module.teacher.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in after.items())


def test_a_callback_does_not_adapt_a_peft_model_a_second_time() -> None:
    class WithPeft(Lit):
        def build(self, seed: int) -> None:
            self.net = peft.get_peft_model(net(seed), peft.LoraConfig(target_modules=["0"]))  # type: ignore[assignment,arg-type]

    module = WithPeft()
    names = [name for name, _ in module.named_parameters()]
    with pytest.raises(AdapterStateError, match="of PEFT already, at 'net'"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    assert [name for name, _ in module.named_parameters()] == names
