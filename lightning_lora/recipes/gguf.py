"""Converts the model in a GGUF file (of llama.cpp) to a folder that transformers loads; each file once, into a
cache."""

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

    The first call writes it into the cache of huggingface_hub; later calls find it by a hash of the file's content.
    Raises ConfigError if transformers cannot read a whole model from the file, CheckpointError if the folder cannot be
    written.
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
            if not folder.is_dir():  # otherwise another process has written it
                raise
    except OSError as error:
        raise CheckpointError(
            f"The model in {file} could not be converted: {error}. It is written to huggingface_hub's cache for "
            "assets: HF_ASSETS_CACHE or HF_HOME names another place."
        ) from error
    return folder


@functools.cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """The hash of the file's content, computed once per process as long as the file's size and time stay the same."""
    return checksum(file, "-" * 64)


def _convert(file: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # by default transformers keeps some architectures' weights quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # A Trainer builds models within contexts (device, inference mode). They must not affect the cached model.
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **options
        )
        model, info = loaded
        wrong = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        if wrong:
            raise ConfigError(f"{file} as a {type(model).__name__} lacks {listed(wrong)}: they would be random.")
        # transformers counts a model read from GGUF as quantized and does not save it: move its weights into a plain
        # model.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
