"""The weights of a base by the names of its modules: from a module, or one by one from safetensors, without a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_lora.checked import did_you_mean
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterFormatError, CheckpointError, ConfigError
from lightning_lora.format.layout import adapter_root
from lightning_lora.hub.address import id_and_revision, is_id, local_path
from lightning_lora.hub.client import translated

Base = nn.Module | str | os.PathLike[str]
"""A module, a safetensors file, a folder with some (as transformers saves a model), or a model's id on the Hub."""

WeightOf = Callable[[str], Tensor]
"""Name in the base (`model.layers.0.mlp.up_proj.weight`) -> tensor; raises AdapterFormatError where there is none."""

_INDEX = ".index.json"


@dataclass(frozen=True)
class BaseFacts:
    """Facts from transformers' config of a base; None and "" where there is no such config."""

    architecture: str = ""
    """The class of the base."""
    is_tied: bool | None = None
    """True if output head and embedding share one weight."""
    is_latent: bool = False
    """True if its keys and values come from a latent vector (DeepSeek-V2, arXiv:2405.04434)."""


def facts_of(base: Base | None, named: str | None, revision: str | None) -> BaseFacts:
    """The facts of `base`. Without one, those of the base that an adapter names, if it lies in a folder here or in the
    Hub's cache."""
    config: Any
    if isinstance(base, nn.Module):
        root = adapter_root(base)[1]
        name, config = type(root).__name__, getattr(root, "config", None)
    else:
        from transformers import AutoConfig

        if base is None:
            where = named or ""  # and the revision is that of the base that the adapter names
        elif local_path(base).exists():
            where, revision = str(local_path(base)), None
        else:
            where, revision, _ = id_and_revision(str(base))
        if not where:
            return BaseFacts()
        try:
            config = AutoConfig.from_pretrained(where, revision=revision, local_files_only=base is None)
        except Exception:  # not there, not fetched, another format, code that is not trusted: not known
            return BaseFacts()
        name = next(iter(config.architectures or []), "")
    if not hasattr(config, "get_text_config"):
        return BaseFacts()
    text = config.get_text_config()
    return BaseFacts(name, getattr(text, "tie_word_embeddings", None), getattr(text, "kv_lora_rank", None) is not None)


def size_of(base: Base | None) -> int | None:
    """The number of bytes of the weights of `base`, in memory or in its files; None where they are not here."""
    if base is None:
        return None
    if isinstance(base, nn.Module):
        return sum(parameter.nbytes for parameter in adapter_root(base)[1].parameters())
    path = local_path(base)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors"))) or None


def weights_of(base: Base) -> WeightOf:
    """A function that reads weights of `base`. Of a model on the Hub ("user/name@revision") only its safetensors are
    fetched.

    Raises ConfigError for a `base` that is none, CheckpointError for files that cannot be read, and HubError and its
    children for a model that cannot be fetched.
    """
    if isinstance(base, nn.Module):
        return _of_module(base)
    path = local_path(base)
    if not path.exists():
        path = _fetched(base)
    return _of_files(path)


def matrix_of(
    weight: WeightOf, name: str, shape: tuple[int, int], *, is_embedding: bool = False, is_transposed: bool = False
) -> Tensor:
    """The weight of the module `name` as the matrix (out, in), of this `shape`, to which its update is added; a kernel
    counts as inputs. `is_transposed` says that linear weights are stored as (in, out).

    Raises AdapterFormatError where the base has another weight there, or a quantized one.
    """
    W = weight(f"{name}.weight" if name else "weight")
    is_other_way = is_embedding or (is_transposed and tuple(W.shape) == shape[::-1])
    found = W.T if is_other_way and W.ndim == 2 else W.flatten(1) if W.ndim > 1 else W
    if tuple(found.shape) != shape or not W.is_floating_point() or W.dtype.itemsize == 1:
        raise AdapterFormatError(
            f"The base's {name}.weight, {tuple(W.shape)} of {W.dtype}, is not the {shape} floating-point weight that "
            "the adapter was trained on: pass its own base, one that is not quantized."
        )
    return found


def _of_module(model: nn.Module) -> WeightOf:
    root = adapter_root(model)[1]
    # Names in an adapter are relative to the base inside a LightningModule; full names in the module also count.
    tensors = dict(Tree.of(model).parameters) | dict(Tree.of(root).parameters)

    def weight(name: str) -> Tensor:
        if name not in tensors:
            raise _absent(name, list(tensors), f"The base, a {type(root).__name__},")
        return tensors[name].detach().cpu()

    return weight


def _of_files(path: Path) -> WeightOf:
    where: dict[str, Path] = {}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    index = next(iter(sorted(path.glob(f"*.safetensors{_INDEX}"))), None) if path.is_dir() else None
    if index is not None:
        try:
            files = [path / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors: {error}.") from error
    if not files:
        raise ConfigError(f"base={str(path)!r} has no safetensors. Pass the model itself, or a folder that has some.")
    for file in files:
        with _opened(file) as handle:
            where |= dict.fromkeys(handle.keys(), file)

    def weight(name: str) -> Tensor:
        key = _key(name, where)
        if key is None:
            raise _absent(name, list(where), f"The base in {path}")
        with _opened(where[key]) as handle:
            tensor: Tensor = handle.get_tensor(key)
            return tensor

    return weight


def _key(name: str, keys: dict[str, Path]) -> str | None:
    """The key for `name`: a file may lack the prefix that a model with a head puts before names, or have one more."""
    if name in keys:
        return name
    near = [key for key in keys if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return near[0] if len(near) == 1 else None


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} could not be read as safetensors: {error}.") from error


def _absent(name: str, names: list[str], what: str) -> AdapterFormatError:
    hint = did_you_mean(name, names, otherwise=" If its file has other names than the model:")
    return AdapterFormatError(f"{what} has no weight {name!r}.{hint} Pass the model itself as base=.")


def _fetched(base: str | os.PathLike[str]) -> Path:
    name, revision, _ = id_and_revision(str(base))
    if not isinstance(base, str) or not is_id(name):
        raise ConfigError(f"base={str(base)!r} is no folder and no file here, nor an id on the Hub.")
    patterns = ["*.safetensors", f"*.safetensors{_INDEX}"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise translated(error, f"fetching the base {base!r}, of which there is no folder here") from error
