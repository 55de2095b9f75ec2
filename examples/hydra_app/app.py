"""A Hydra app of your own that takes the config groups of lightning_lora.

    python examples/hydra_app/app.py
    python examples/hydra_app/app.py lora=gaussian lora.rank=4 optimizer.lr=1e-3
    python examples/hydra_app/app.py -m lora.rank=2,8

`conf/config.yaml` has one line, `hydra.searchpath`, by which `lora: rslora`, `trainer: cpu`, `callbacks: default` and
the others are found; groups of the app's own, such as `module`, lie beside it and are found first.
"""

from __future__ import annotations

import hydra
import lightning.pytorch as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_lora import LoRACallback


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    pl.seed_everything(config.seed)
    callbacks = list(instantiate(config.callbacks, _convert_="all").values())
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=False)
    module = instantiate(config.module, optimizer=instantiate(config.optimizer))
    data = instantiate(config.data)

    trainer.fit(module, data)
    [lora] = [callback for callback in callbacks if isinstance(callback, LoRACallback)]
    accuracy = trainer.callback_metrics[config.monitor].item()
    print(
        f"accuracy {accuracy:.1%} on held-back lines, after {trainer.global_step} steps of "
        f"{lora.report.trainable_share:.1%} of the parameters (rank {lora.config.rank})"
    )
    print(f"checkpoints and adapter: {trainer.checkpoint_callback.dirpath}")
    return accuracy  # what a sweeper of Hydra's would maximise


if __name__ == "__main__":
    main()
