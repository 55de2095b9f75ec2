"""A base with an adapter baked in, as a folder that transformers loads without this package."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lightning_lora.engine import merge
from lightning_lora.engine.merge import shares_kept
from lightning_lora.errors import CheckpointError, ConfigError, listed
from lightning_lora.files import written_beside
from lightning_lora.format.folder import check_folder, open_tensors, read_config
from lightning_lora.format.peft import PREFIX
from lightning_lora.hub import load_adapter
from lightning_lora.hub.consumers import CONSUMERS
from lightning_lora.hub.pull import adapter_folder
from lightning_lora.recipes.models import ModelSource

HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task whose model may have another head than the saved base -> the class that has this head."""
OTHERS = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge; `str()` gives a few lines."""

    model: str
    """The name of its class."""
    dtype: torch.dtype
    kept: Mapping[str, tuple[float, float]]
    """Weight -> the share of its update that survives the precision, and the update's Frobenius norm."""
    is_tied: bool | None
    """True if the output head still is the input embedding; None if the base did not tie them."""
    notes: tuple[str, ...]
    files: Mapping[str, int]
    """Name -> size in bytes."""

    @property
    def share(self) -> float:
        """The share of all updates together that survives: the mean of `kept`, weighted by the squared norms."""
        whole = sum(norm**2 for _, norm in self.kept.values())
        return sum(share * norm**2 for share, norm in self.kept.values()) / whole if whole else 1.0

    def __str__(self) -> str:
        count, dtype = len(self.kept), str(self.dtype).removeprefix("torch.")
        lines = [f"merged into {count} weight{'' if count == 1 else 's'} of {self.model}, stored in {dtype}"]
        if self.kept:
            least = min(self.kept, key=lambda name: self.kept[name][0])
            of_least = f" (the least: {100 * self.kept[least][0]:.4g} % in {least})" if self.share < 1 else ""
            lines.append(f"{100 * self.share:.4g} % of the update survives the precision{of_least}")
        if self.is_tied is not None:
            said = "still share one weight" if self.is_tied else "no longer share one weight, since one was adapted"
            lines.append(f"head and embedding {said}: tie_word_embeddings={str(self.is_tied).lower()}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"{size:>15,}  {name}" for name, size in self.files.items())])


def merge_adapter(
    adapter: str | os.PathLike[str],
    source: ModelSource | None,
    output: Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    ignore_fields: Collection[str] = (),
    load_embedding_layers: bool = False,
    check_base: bool = True,
) -> MergeReport:
    """Merge the adapter (a folder or an id on the Hub) into the model of `source` (None: the base that the adapter
    names), and save model and tokenizer to `output`, which is written whole or not at all. With `load_embedding_layers`
    the embedding and the head in the adapter's file become the model's, and the tokenizer in its folder, if there is
    one.

    Raises ConfigError if the base is not known or `output` holds files, and the errors of ModelSource, `load_adapter`
    and `merge`. Nothing is written then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output={output} is there already. Choose a folder that is not, or that is empty.")
    folder = adapter_folder(adapter, revision, subfolder=subfolder, ignore_fields=ignore_fields)
    check_folder(folder)
    config = read_config(folder)
    source = source or named_base(config, folder)
    model = loaded_base(source, config, folder)
    if load_embedding_layers:
        _resize_vocabulary(model, folder)
    was_tied = _is_tied(model)  # read now: the `weight` of an adapted layer is another tensor
    load_adapter(
        model,
        folder,
        check_base=check_base,
        ignore_fields=ignore_fields,
        load_embedding_layers=load_embedding_layers,
    )
    kept = shares_kept(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge(model)
    tied = _is_tied(model)
    if was_tied and not tied:
        for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            part.tie_word_embeddings = False
    # The report itself says what is untied and how much is rounded away.
    spoken_of = ("Merging unties", "Merging rounds")
    notes = tuple(str(w.message) for w in said if not str(w.message).startswith(spoken_of))
    if was_tied and not tied and type(model).__name__ in CONSUMERS["llama.cpp"].one_table:
        notes += (f"llama.cpp has no separate head for {type(model).__name__}, and would leave this one out silently",)
    has_tokens = load_embedding_layers and (folder / "tokenizer_config.json").is_file()
    if load_embedding_layers and not has_tokens:
        notes += ("the adapter's folder has no tokenizer: tokens that were added are not in the base's",)
    files = _write(model, source, output, tokenizer=folder if has_tokens else None)
    return MergeReport(type(model).__name__, model.dtype, kept, tied if was_tied else None, notes, files)


def named_base(config: Any, folder: Path) -> ModelSource:
    name = config.get("base_model_name_or_path") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"The adapter in {folder} names no base. Give model=, a folder or an id on the Hub.")
    is_there = Path(name).is_dir()
    return ModelSource(name=name, revision=None if is_there else config.get("revision"))


def loaded_base(source: ModelSource, config: Mapping[str, Any], folder: Path) -> Any:
    """The base in `source`, with the head that the adapter was trained with.

    Raises ConfigError where the base lacks weights that the adapter does not bring: they would be random.
    """
    task = config.get("task_type") or ""
    options: dict[str, Any] = {}
    if task in HEADS:
        name = HEADS[task]
        labels = _labels(config, folder)
        options |= {} if labels is None else {"num_labels": labels}
    else:
        name = next(iter(source.config().architectures or []), "")
        name = name if hasattr(transformers, name) else OTHERS.get(task, "AutoModel")
    loaded: Any = source.load_and_random(name, **options)
    model, missing = loaded
    brought = tuple(config.get("modules_to_save") or ())
    random = [key for key in missing if not any(f".{part}." in f".{key}" for part in brought)]
    if random:
        raise ConfigError(
            f"{source.name} as a {type(model).__name__} lacks {listed(random)}, and the adapter in {folder} does not "
            "bring them: the merged model would have random weights there. Give the model= that it was trained on."
        )
    return model


def _labels(config: Mapping[str, Any], folder: Path) -> int | None:
    """The number of outputs of the saved head; None if the adapter's file has no head."""
    with open_tensors(folder) as file:
        shapes = file.header.shapes
    for name in config.get("modules_to_save") or ():
        for ending in (f".{name}.weight", f".{name}.out_proj.weight"):
            found = [shape for key, shape in shapes.items() if key.endswith(ending)]
            if found:
                return int(found[0][0])
    return None


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return isinstance(head, nn.Module) and isinstance(embedding, nn.Module) and head.weight is embedding.weight


def _resize_vocabulary(model: Any, folder: Path) -> None:
    """Give the embedding and the head of `model` as many rows as the embedding in the adapter's file has. Which numbers
    they hold is no matter: those of the file are loaded."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with open_tensors(folder) as file:
        shape = file.header.shapes.get(f"{PREFIX}{name}.weight", embedding.weight.shape)
    if shape[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(shape[0], mean_resizing=False)


def _write(model: Any, source: ModelSource, output: Path, tokenizer: Path | None) -> dict[str, int]:
    output = Path(os.path.realpath(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(output) as staged:
            model.save_pretrained(staged)
            _save_processor(source, staged)
            if tokenizer is not None:
                transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(staged)
            if output.is_dir():
                output.rmdir()
    except OSError as error:
        raise CheckpointError(f"The model could not be written to {output}: {error.strerror or error}.") from error
    return {path.name: path.stat().st_size for path in sorted(output.iterdir()) if path.is_file()}


def _save_processor(source: ModelSource, folder: Path) -> None:
    """Save the base's tokenizer or processor unchanged; a base may have none."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError):
        return
    processor.save_pretrained(folder)
