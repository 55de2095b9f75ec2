"""Direct preference optimization (DPO) with one model: its own base, adapters switched off, is the reference.

    python examples/dpo.py

A small network that continues sequences of digits has learnt to count upwards. Pairs of answers say that counting
downwards is preferred. The loss asks by how much the adapted model prefers the one answer, compared with the bare base:
`with disabled(model)` gives the base's answer, so no second copy of it lies in memory (Rafailov et al. 2023,
arXiv:2305.18290, equation 7).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, disabled

DIGITS, LENGTH, BETA = 10, 6, 0.5


class Counter(nn.Module):
    """The next digit, from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(DIGITS, 32)
        self.inside = nn.Linear(32, 64)
        self.head = nn.Linear(64, DIGITS)

    def forward(self, x: Tensor) -> Tensor:  # (rows, length) -> (rows, length, digits)
        return self.head(self.inside(self.table(x)).tanh())


class Preferences(pl.LightningModule):
    """DPO as it is in the paper; rows are (preferred, other) answers to one first digit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def log_probability(self, x: Tensor) -> Tensor:  # (rows, length) -> (rows,)
        logits = self.model(x[:, :-1]).log_softmax(-1)
        return logits.gather(-1, x[:, 1:, None]).squeeze(-1).sum(-1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        preferred, other = batch
        with torch.no_grad(), disabled(self):
            reference = self.log_probability(preferred) - self.log_probability(other)
        policy = self.log_probability(preferred) - self.log_probability(other)
        return -F.logsigmoid(BETA * (policy - reference)).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def counted(step: int) -> Tensor:  # (rows, length): from each digit on, round and round
    return (torch.arange(DIGITS)[:, None] + step * torch.arange(LENGTH)) % DIGITS


def share(model: nn.Module) -> float:
    """How often of ten digits the next one that the model says is the one below, in percent."""
    down = counted(-1)
    return 100 * float((model(down[:, :1])[:, -1].argmax(-1) == down[:, 1]).float().mean())


torch.set_num_threads(1)  # so small a network gains nothing from more
pl.seed_everything(0)
folder = Path(tempfile.mkdtemp(prefix="dpo-"))
base = Counter()
optimizer = torch.optim.Adam(base.parameters(), lr=1e-2)
up, down = counted(1), counted(-1)
for _ in range(100):
    optimizer.zero_grad()
    F.cross_entropy(base(up[:, :-1]).flatten(0, 1), up[:, 1:].flatten()).backward()
    optimizer.step()
with torch.no_grad():
    before, answers = share(base), base(up)

trainer = pl.Trainer(
    max_epochs=100,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    default_root_dir=folder,
    callbacks=[LoRACallback(rank=4, target_modules=["table", "inside", "head"])],
)
module = Preferences(base)
trainer.fit(module, DataLoader(TensorDataset(down, up), batch_size=DIGITS))
checkpoint = Path(trainer.checkpoint_callback.best_model_path)
with torch.no_grad():
    after = share(base)
    with disabled(module):
        assert torch.equal(base(up), answers)  # the base is still there, bit for bit

print(
    f"\naccuracy on preferred answers: {before:.1f}% before, {after:.1f}% after; adapters off: the base's own answers"
)
print(f"adapter: {checkpoint.with_name(f'{checkpoint.stem}-adapter')}")
