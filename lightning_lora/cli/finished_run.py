"""`run=FOLDER`: the model, data and task of a finished run, taken from its folder instead of spelt out again."""

from __future__ import annotations

import glob
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lightning_lora.cli.composition import CONFIG_MODULE
from lightning_lora.cli.results import CONFIG, RESULTS
from lightning_lora.errors import ConfigError

TAKEN = ("model", "data", "task")
LINKED = ("model", "optimizer", "scheduler")
ADAPTER_MISSING = (
    "Give run=FOLDER for what a run has trained, on the data of that run; adapter=FOLDER; or adapter=null for the bare "
    "base."
)


def with_finished_run(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The config name and the arguments for Hydra: where there is a `run=FOLDER`, a configuration made from it.

    A group that the user chooses anew (`data=text`) is not taken from the run. Raises ConfigError for a folder that is
    no run's.
    """
    given = [a for a in arguments if a.startswith("run=")]
    if not given:
        return command, arguments
    folder = Path(given[-1].removeprefix("run=").strip("'\"")).expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"run={folder} is not the folder of a run: it has no {CONFIG}.")
    taken = [name for name in TAKEN if not any(a.startswith(f"{name}=") for a in arguments)]
    name = f"{command}_of_run"
    ConfigStore.instance().store(name=name, node=_configuration(command, folder.absolute(), taken))
    return name, [a for a in arguments if a not in given]


def _configuration(command: str, folder: Path, taken: list[str]) -> dict[str, Any]:
    text = files(CONFIG_MODULE).joinpath(f"{command}.yaml").read_text(encoding="utf-8")
    config: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    config["defaults"] = [d for d in config["defaults"] if d == "_self_" or next(iter(d)) not in taken]
    run: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=False)
    hydra = folder / ".hydra" / "hydra.yaml"
    if hydra.is_file() and (cwd := OmegaConf.select(OmegaConf.load(hydra), "hydra.runtime.cwd")) is not None:
        run = _from(Path(cwd), run)
    for name in taken:
        config[name] = _linked(run[name], run)
    config.update(_trained(folder, adapted=run.get("lora") is not None))
    return config


def _from(started_in: Path, node: Any) -> Any:
    """`node` with the files and folders that it names from where the run was started, wherever this is."""
    if isinstance(node, list):
        return [_from(started_in, value) for value in node]
    if not isinstance(node, dict):
        return node
    moved = {}
    for key, value in node.items():
        is_place = isinstance(value, str) and value and "://" not in value and (key == "name" or key.endswith("path"))
        place = str(started_in / value) if is_place else ""  # an absolute path stays itself
        moved[key] = place if place and glob.glob(place, recursive=True) else _from(started_in, value)
    return moved


def _linked(node: Any, run: dict[str, Any]) -> Any:
    """`node` with references where it repeats another node, so that model.dtype=... still reaches the task."""
    for key, value in (node or {}).items():
        for name in LINKED:
            if isinstance(value, dict) and value == run.get(name):
                node[key] = f"${{{name}}}"
    return node


def _trained(folder: Path, adapted: bool) -> dict[str, str | None]:
    """What the run has trained: its adapter, or where it had none its best checkpoint."""
    if (folder / "adapter").is_dir():
        return {"adapter": str(folder / "adapter")}
    results = folder / RESULTS
    best = json.loads(results.read_text(encoding="utf-8")).get("best_checkpoint") if results.is_file() else None
    if adapted or best is None:
        beside = sorted(str(path) for path in folder.glob("checkpoints/*-adapter"))
        hint = f"Name one that lies beside a checkpoint with adapter=: {', '.join(beside)}" if beside else ""
        raise ConfigError(f"run={folder} has no {'adapter' if adapted else 'best checkpoint'}: it did not end. {hint}")
    return {"adapter": None, "ckpt_path": str(folder / best)}
