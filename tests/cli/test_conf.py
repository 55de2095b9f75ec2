"""Every option that ships in conf/ composes, and fits the signatures of what it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.cli.composition import rehearsal
from lightning_lora.cli.settings import checked
from lightning_lora.cli.train import Settings

CONF = Path(__file__).parents[2] / "conf"
MISSING = {"model": "name", "data": "source.path", "task": "_target_"}
OPTIONS = [
    f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name not in ("hydra",)
]


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_fits_what_it_configures(option):
    group, _, name = option.partition("=")
    given = [option]
    if name == "custom":
        target = "lightning.pytorch.LightningModule" if group == "task" else "lightning.pytorch.LightningDataModule"
        given.append(f"{group}._target_={target}")
    elif name in ("pretrained", "text", "text_classification", "images", "instructions"):
        given.append(f"{group}.{MISSING[group]}=somewhere")
    elif option == "lora=alora":
        given.append("lora.alora_invocation_tokens=[5,17]")
    with rehearsal("train", given) as config:
        checked(config, Settings)


def test_another_application_can_take_the_groups(tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    (tmp_path / "app.yaml").write_text(
        "hydra: {searchpath: [pkg://lightning_lora.conf]}\ndefaults: [{lora: rslora}, _self_]\nmine: 1\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("app", ["lora.rank=4"])
    assert config.lora.rank == 4
    assert config.lora.use_rslora
