"""A model that lies in a GGUF file (of llama.cpp), as a folder that transformers loads: converted once, then cached."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import cached_assets_path
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import CheckpointError, ConfigError, listed
from lightning_lora.files import written_beside
from lightning_lora.hub.download import checksum


def converted(file: Path) -> Path:
    """The folder with config, float32 weights and tokenizer of the causal language model in the GGUF `file`.

    It is written at the first call, into the cache of huggingface_hub, and found again by the file's content. Raises
    ConfigError where transformers reads no whole model from the file, CheckpointError where nothing can be written.
    """
    state = file.stat()
    # Another version of transformers may read the same file in another way.
    name = f"{_sha256(file, state.st_size, state.st_mtime_ns)[:16]}-transformers-{transformers.__version__}"
    try:
        folder = cached_assets_path("lightning_lora", "gguf", "models") / name
        if folder.is_dir():
            return folder
        rank_zero_info(f"{file.name} is converted for transformers, once, and kept in {folder}")
        try:
            with written_beside(folder) as staged:
                _convert(file, staged)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
    except OSError as error:
        raise CheckpointError(
            f"The model in {file} could not be converted: {error}. It is written to huggingface_hub's cache for "
            "assets: HF_ASSETS_CACHE or HF_HOME names another place."
        ) from error
    return folder


@functools.cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Computed once in a process for a file in this state."""
    return checksum(file, "-" * 64)


def _convert(file: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # by itself transformers keeps some architectures' weights quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The contexts of a Trainer, in which models are built, are not for what is kept in a cache.
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **options
        )
        model, info = loaded
        wrong = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        if wrong:
            raise ConfigError(f"{file} as a {type(model).__name__} lacks {listed(wrong)}: they would be random.")
        # A model that was read from GGUF counts as quantized, and is not saved: its weights go into one that is not.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
