"""Recommend learning rate, rank and variants, from short measured trainings on your own data.

lightning-lora advise                                      the embedded model and data, in ten minutes
lightning-lora advise minutes=30 max_rank=64 compare=[targets,dora]
lightning-lora advise model=pretrained model.name=ID data=text data.source.path=notes.txt
lightning-lora advise trainer.limit_val_batches=20         less time for validation, more for training

All settings of train hold. What is recommended is written as experiment/advised.yaml, and the last line printed is the
command that trains with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lightning_lora.cli import train
from lightning_lora.cli.process import quieten, use_available_cores
from lightning_lora.cli.results import shown, write_json
from lightning_lora.cli.settings import build, parameters, target, task_and_data
from lightning_lora.errors import ConfigError
from lightning_lora.files import written_beside

if TYPE_CHECKING:
    from lightning_lora import LoRACallback
    from lightning_lora.training.advice import Advice


@dataclass(frozen=True)
class Settings(train.Settings):
    """The settings of train, and those of the search."""

    minutes: float
    max_rank: int
    learning_rates: list[float] | None
    compare: list[str]
    seeds: int
    steps: int | None


OWN = ("minutes", "max_rank", "learning_rates", "compare", "seeds", "steps")
EXPERIMENT = "advised"


def run(settings: dict[str, Any]) -> None:
    """Search as `settings` say; print what was found, and write advised.yaml, advice.json and advice.png."""
    from lightning_lora.training.advise import advise
    from lightning_lora.training.search import around

    quieten()
    use_available_cores()
    for name in ("adapter", "ckpt_path"):
        if settings[name] is not None:
            raise ConfigError(f"{name}={settings[name]}: advise starts every candidate anew. Leave it out.")
    train.seed(settings)
    train.check_optimizer(settings)
    task, data = task_and_data(settings)
    train.train_new_heads(settings, task)
    name, callback = _lora(settings)
    folder = train.make_folder(settings)
    node = settings["callbacks"][name]
    where, rate = _where_rate(settings)
    advice = advise(
        task,
        data,
        config=callback.config,
        lora_plus_ratio=node.get("lora_plus_ratio"),
        product_decay=node.get("product_decay"),
        trainer=partial(build, settings, "trainer"),
        monitor=settings["monitor"],
        mode=settings["mode"],
        seed=settings["seed"] or 0,
        learning_rates=settings["learning_rates"] or (around(rate) if rate and where == "optimizer.lr" else None),
        minutes=settings["minutes"],
        max_rank=settings["max_rank"],
        compare=settings["compare"],
        seeds=settings["seeds"],
        steps=settings["steps"],
        progress=partial(print, flush=True),
    )
    if rate is not None and abs(rate - advice.own_rate) > 1e-6 * rate:
        where = None  # the task takes its learning rate from elsewhere
    assert callback.config is not None
    advised = _advised(advice, callback.config.to_dict(), name, where)
    experiment = folder / "experiment" / f"{EXPERIMENT}.yaml"
    _write(experiment, advised, advice)
    command = _command(folder, advised)
    write_json(folder / "advice.json", {**_content(advice), "command": command})
    _plot(advice, folder / "advice.png")
    print(f"\n{advice}\n")
    if where is None:
        print(f"Set the learning rate {advice.lr:.2g} in {type(task).__name__} yourself: no setting gives it.\n")
    for what, path in {"settings": experiment, "picture": folder / "advice.png"}.items():
        print(f"{what:<12} {shown(path)}")
    print(f"{'train':<12} {command}")


def _lora(settings: dict[str, Any]) -> tuple[str, LoRACallback]:
    """The name of the LoRACallback in `settings`, and the callback."""
    from lightning_lora.cli.runs import is_callback

    for name, node in (settings["callbacks"] or {}).items():
        if node and is_callback(node):
            return name, build(settings, f"callbacks.{name}")
    raise ConfigError("advise compares adapters, and the settings have no LoRACallback (lora=none?).")


def _where_rate(settings: dict[str, Any]) -> tuple[str | None, float | None]:
    """The setting that gives the task its learning rate, and its value; None where no setting does."""
    task = settings["task"]
    known = parameters(target(task["_target_"]))
    own = [name for name in ("learning_rate", "lr") if name in known]
    given = next((name for name in own if task.get(name) is not None), None)
    if given is not None:
        return f"task.{given}", float(task[given])
    if "optimizer" in task and settings["optimizer"]:
        rate = settings["optimizer"].get("lr")
        return "optimizer.lr", None if rate is None else float(rate)
    return (f"task.{own[0]}", None) if own else (None, None)


def _advised(advice: Advice, before: Mapping[str, Any], callback: str, where: str | None) -> dict[str, Any]:
    """The recommended settings, those that differ from the ones given, by dotted name; rank and alpha always."""
    after = advice.config.to_dict()
    advised = {f"lora.{key}": after[key] for key in after if key in ("rank", "alpha") or after[key] != before[key]}
    if where is not None:
        advised[where] = advice.lr
    if advice.lora_plus_ratio is not None:
        advised[f"callbacks.{callback}.lora_plus_ratio"] = advice.lora_plus_ratio
    return advised


def _write(path: Path, advised: Mapping[str, Any], advice: Advice) -> None:
    """Write `advised` as an experiment: a difference to all groups, and to the experiment that was chosen."""
    chosen = HydraConfig.get().runtime.choices.get("experiment")
    config = OmegaConf.create({"defaults": [*([chosen] if chosen else []), "_self_"]})
    for key, value in advised.items():
        OmegaConf.update(config, key, value)
    said = "\n".join(f"# {line}" for line in advice.recommended)
    path.parent.mkdir(exist_ok=True)
    with written_beside(path) as beside:
        beside.write_text(f"# @package _global_\n{said}\n{OmegaConf.to_yaml(config)}", encoding="utf-8")


def _command(folder: Path, advised: Mapping[str, Any]) -> str:
    """The command that trains as recommended: the overrides of this one, but for what is advised; from any folder."""
    hydra = HydraConfig.get()
    left_out = {*advised, *OWN, "experiment", "run_dir"}
    overrides = [o for o in hydra.overrides.task if o.lstrip("+~").partition("=")[0] not in left_out]
    own = [s.path for s in hydra.runtime.config_sources if s.schema == "file"]  # folders of settings of the user's
    flags = ["--config-dir", str(folder.absolute())]
    if own:  # Hydra takes one --config-dir
        places = ",".join(f"'file://{place}'" for place in (folder.absolute(), *own))
        flags = [f"hydra.searchpath=[{places}]"]
    return shlex.join([train.PROGRAM, "train", *flags, f"experiment={EXPERIMENT}", *map(_from_anywhere, overrides)])


def _from_anywhere(override: str) -> str:
    """`override` with an absolute path, where it names an existing file or folder relative to the current one."""
    key, _, value = override.partition("=")
    path = value.strip("'\"")
    is_place = bool(path) and (key.endswith(("path", ".name")))
    return f"{key}='{Path(path).absolute()}'" if is_place and Path(path).exists() else override


def _content(advice: Advice) -> dict[str, Any]:
    return {
        "config": advice.config.to_dict(),
        "lr": advice.lr,
        "lora_plus_ratio": advice.lora_plus_ratio,
        "base": advice.base,
        "spread": advice.spread,
        "candidates": advice.rows(),
        "cuts": [
            {**row, "rank_pattern": dict(cuts[0].rank_pattern)}
            for row, cuts in zip(advice.cut_rows(), advice.cuts, strict=True)
        ],
        "recommended": advice.recommended,
        "unknown": advice.unknown,
    }


def _plot(advice: Advice, path: Path) -> None:
    from lightning_lora.cli.plot import plot_advice
    from lightning_lora.training.trials import mean

    trained = [(f"{c.name}, rank {c.config.rank}", c.lr, c.steps, c.values()) for c in advice.candidates if c.values()]
    last = [c for c in advice.candidates if c.steps == advice.steps]
    ranks = {"trained at that rank": [(float(c.config.rank), c.values()) for c in last]}
    if advice.cuts:
        by_name = {
            cuts[0].name: (mean([cut.rank for cut in cuts]), [cut.value for cut in cuts]) for cuts in advice.cuts
        }
        top = (float(max(c.config.rank for c in last)), list(advice.whole))
        for label, start in (("cut to a rank", "rank"), ("cut by energy", "energy")):
            ranks[label] = sorted([top, *(cut for name, cut in by_name.items() if name.startswith(start))])
    plot_advice(trained, ranks, advice.base, path, metric=advice.monitor, mode=advice.mode)
