"""LoRA for a transformers model, inside a LightningModule of one's own; the adapter then goes to PEFT.

    python examples/transformers_model.py

The small language model of this package (English prose, byte by byte) learns the standard library's source for a few
steps. Put the id of any causal language model in place of BASE.
"""

from __future__ import annotations

import math
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import LoRACallback, save_adapter
from lightning_lora.embedded import BASE

BLOCK, BATCH, STEPS = 128, 8, 30


class LanguageModel(pl.LightningModule):
    """An ordinary module around `AutoModelForCausalLM`; batches are token ids (rows, BLOCK)."""

    def __init__(self, name: str | Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name).train()

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=ids, labels=ids, use_cache=False).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def blocks() -> Tensor:
    """Token ids of some source files, (blocks, BLOCK), in random order."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    library = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((library / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "doctest.py"))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    ids = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    return ids[torch.randperm(len(ids))]


pl.seed_everything(0)
folder = Path(tempfile.mkdtemp(prefix="transformers_model-"))
held_back, rows = blocks().split([32, len(blocks()) - 32])
training, validation = DataLoader(rows, BATCH, shuffle=True), DataLoader(held_back, BATCH)

module = LanguageModel(BASE)
lora = LoRACallback(rank=8, alpha=16)  # every Linear but the output head
trainer = pl.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    callbacks=[lora],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
before = trainer.validate(module, validation, verbose=False)[0]["val_loss"]
trainer.fit(module, training)
after = trainer.validate(module, validation, verbose=False)[0]["val_loss"]
save_adapter(module, folder)

outcome = "PEFT is not installed, so it was not asked"
if find_spec("peft"):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder).eval()
    with torch.no_grad():
        ours, theirs = (m(input_ids=held_back[:2]).logits for m in (module.model.eval(), model))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    outcome = "PEFT loads the adapter and gives the same outputs"

print(
    f"perplexity per byte of source: {math.exp(before):.2f} before, {math.exp(after):.2f} after {STEPS} steps of "
    f"{lora.report.trainable_share:.1%} of the parameters; {outcome}"
)
print(f"adapter: {folder}")
