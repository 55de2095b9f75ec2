"""The README.md of an adapter: what it is, how it was trained, and how to load it.

This package writes between two marks. The text around them is the user's, and so are the entries of the front matter
that we do not set: `merge_cards` keeps both.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import yaml

from lightning_lora.errors import ConfigError, listed
from lightning_lora.hub.address import base_id
from lightning_lora.hub.consumers import CONSUMERS

BEGIN = "<!-- lightning_lora writes between this mark and the next one anew. Your own text is kept outside. -->"
END = "<!-- lightning_lora: end -->"

_MARKED = re.compile(r"<!-- lightning_lora writes .*?-->.*?<!-- lightning_lora: end -->", re.DOTALL)
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)

_BASE_TAG = re.compile(r"base_model:(?:(?:adapter|finetune|merge|quantized):)?(.*)", re.DOTALL)

# PEFT's name of a task -> the Hub's, and the class of transformers that has its head.
TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts for the card of an adapter that its files do not hold. All of them are optional."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Final values, by name: {"val_loss": 0.3}."""
    step: int | None = None
    """The number of optimizer steps that were trained."""
    data: str | None = None
    """The training data, in your words; never a local path."""
    datasets: Sequence[str] = ()
    """The ids of the data sets on the Hub."""
    picture: str | os.PathLike[str] | None = None
    """A PNG of the training curve."""
    front_matter: Mapping[str, Any] = field(default_factory=dict)
    """Entries for the top of the card: {"license": "mit", "language": ["en"], "tags": [...]}."""

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str):
            raise ConfigError(f"datasets of a card are a list of ids on the Hub, not {self.datasets!r}.")

    @staticmethod
    def of(given: Card | Mapping[str, Any] | None) -> Card:
        """A Card from `given`, which is one, or a mapping of its fields, or None. Raises ConfigError for others."""
        if isinstance(given, Card):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(f"card is a lightning_lora.Card, or a mapping of its fields, not {given!r}.")
        names = Card.__dataclass_fields__
        if unknown := [name for name in given or {} if name not in names]:
            raise ConfigError(
                f"A card has no field {listed(map(repr, unknown))}: its fields are {listed(names)}. License, language "
                "and tags go into front_matter."
            )
        return Card(**{name: value for name, value in (given or {}).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class RunFacts(Card):
    """The facts of a Card, and those that are known where the card is written."""

    repo_id: str | None = None
    curve: str | None = None
    """The file name of the picture beside the card."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further rows of the card's table: name -> text."""


def model_card(
    config: Mapping[str, Any], *, modules: int, parameters: int, module: str, run: RunFacts | None = None
) -> str:
    """The card of an adapter from its `adapter_config.json`; `parameters` counts what was trained, `module` is the
    name of the base inside the model that was trained, or ""."""
    run = run or RunFacts()
    base = base_id(config.get("base_model_name_or_path"))
    sections = [
        [f"# {run.repo_id.rpartition('/')[2] if run.repo_id else 'LoRA adapter'}"],
        _table(config, base, modules, parameters, run),
        _results(run),
        _loading(config, base, module, run),
    ]
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return _joined(_front_matter(config, base, run), "", f"{BEGIN}\n\n{body}\n\n{END}", "")


def merge_cards(ours: str, *others: str | None, explicit: Collection[str] = ()) -> str:
    """`ours`, with the text and the front matter that users wrote into `others`; earlier ones win over later ones. For
    the keys in `explicit`, which a user has just set, the value in `ours` wins."""
    card = _split(ours)
    front, before, after = dict(card.front), card.before, card.after
    for other in reversed([_split(text) for text in others if text]):
        front = _merge_front_matter(front, other, explicit)
        before = _with(other.before, before, known=other.before + other.after)
        after = _with(other.after, after, known=other.before + other.after)
    return _joined(front, before, card.section or "", after)


class _Card(NamedTuple):
    front: dict[str, Any]
    before: str
    section: str | None
    """Between the marks, these included."""
    after: str


def _split(text: str) -> _Card:
    front: Any = {}
    text = text.removeprefix("\ufeff")  # the mark that editors on Windows put before a text
    if found := _FRONT.match(text):
        try:
            front = yaml.load(found[1], _FrontMatter) or {}
        except yaml.YAMLError:
            front = {}  # the Hub would refuse it as well
        text = text[found.end() :]
    front = dict(front) if isinstance(front, Mapping) else {}
    marked = _MARKED.search(text)
    if marked is None:
        return _Card(front, text.strip(), None, "")
    return _Card(front, text[: marked.start()].strip(), marked[0], text[marked.end() :].strip())


class _FrontMatter(yaml.SafeLoader):
    """Reads front matter as the Hub does: `language: no` is Norwegian, and not false as in older YAML."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FrontMatter.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$", re.IGNORECASE), list("tTfF"))


def _joined(front: Mapping[str, Any], before: str, section: str, after: str) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=10_000)
    body = "\n\n".join(part for part in (before, section, after) if part)
    return f"---\n{head}---\n\n{body}\n"


def _with(theirs: str, ours: str, known: str) -> str:
    """Both texts; `ours` is left out where `known` has it already."""
    if not ours or ours in known:
        return theirs
    return f"{theirs}\n\n{ours}" if theirs else ours


def _merge_front_matter(ours: Mapping[str, Any], other: _Card, explicit: Collection[str]) -> dict[str, Any]:
    theirs = other.front
    first = (*_OURS, *explicit)
    merged = {**ours, **{key: value for key, value in theirs.items() if key not in ("base_model", *first)}}
    for key in first:
        if key in ours or key in theirs:
            merged[key] = ours.get(key, theirs.get(key))
    if "model-index" in merged:
        merged["model-index"] = _merge_results(ours.get("model-index"), theirs.get("model-index"), other.section or "")
        if not merged["model-index"]:
            del merged["model-index"]
    base = ours.get("base_model", theirs.get("base_model"))
    named = [name for name in _list(base) if base_id(name) is not None]
    base = (named if isinstance(base, list) else named[0]) if named else None
    merged.pop("base_model", None)
    if base is not None:
        merged = {"library_name": merged.get("library_name", "peft"), "base_model": base, **merged}
    for key in ("tags", "datasets"):
        both = [*_list(ours.get(key)), *_list(theirs.get(key))]
        if both:
            merged[key] = [entry for entry in dict.fromkeys(both) if not _names_local_base(entry)]
    return merged


def _merge_results(ours: Any, theirs: Any, section: str) -> list[Any] | None:
    """The model-index of both, merged like huggingface_hub's `metadata_update` does: a value of the same measurement is
    replaced, and other measurements stay. Those of an earlier push, which its `section` of the card shows, are dropped:
    they do not hold for this adapter."""
    try:
        merged = copy.deepcopy(theirs or [])
        for model in merged:
            for result in model["results"]:
                result["metrics"] = [m for m in result["metrics"] if not _is_said(result, m, section)]
            model["results"] = [result for result in model["results"] if result["metrics"]]
        merged = [model for model in merged if model["results"]]
        for result in (result for model in ours or [] for result in model["results"] if merged):
            results = merged[0]["results"]
            same = next((other for other in results if _same(result, other, "metrics")), None)
            if same is None:
                results.append(result)
                continue
            for metric in result["metrics"]:
                known = [m for m in same["metrics"] if _same(metric, m, "value", "verifyToken")]
                for other in known:
                    other["value"] = metric["value"]
                same["metrics"] += [] if known else [metric]
        return merged or ours
    except (TypeError, KeyError, AttributeError):  # not a valid model-index: the Hub would show nothing of it
        return ours


def _is_said(result: Mapping[str, Any], metric: Mapping[str, Any], section: str) -> bool:
    """True if `section`, our part of a card, shows this metric for the data that it names."""
    name, value = metric.get("name"), metric.get("value")
    if not isinstance(value, (int, float)) or _metric_row(str(name), value) not in section:
        return False
    data = re.search(r"^\| data \| (.*) \|$", section, re.MULTILINE)
    return data is None or data[1] == _cell(str((result.get("dataset") or {}).get("name")))


def _same(one: Mapping[str, Any], other: Mapping[str, Any], *but: str) -> bool:
    return all(one.get(key) == other.get(key) for key in {*one, *other} - set(but))


def _metric_row(name: str, value: float) -> str:
    return f"| {_cell(name)} | {value:.6g} |"


def _names_local_base(tag: Any) -> bool:
    """True if a tag such as PEFT's "base_model:adapter:/home/me/base" holds a path of the machine that trained."""
    found = _BASE_TAG.fullmatch(tag) if isinstance(tag, str) else None
    return found is not None and base_id(found[1]) is None


# Our values of these keys win over those of an existing card.
_OURS = ("library_name", "base_model_relation")


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _front_matter(config: Mapping[str, Any], base: str | None, run: RunFacts) -> dict[str, Any]:
    task = TASKS.get(config.get("task_type") or "", ("other", ""))[0]
    front: dict[str, Any] = {"library_name": "peft"}
    tags = ["lora", "lightning-lora"]
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
        tags.insert(0, f"base_model:adapter:{base}")
    if task != "other":
        front["pipeline_tag"] = task
    front["tags"] = tags
    if run.datasets:
        front["datasets"] = list(run.datasets)
    metrics = {name: value for name, value in run.metrics.items() if math.isfinite(value)}
    if metrics:
        dataset = run.datasets[0] if run.datasets else re.sub(r"[^\w.-]+", "-", run.data or "").strip("-.") or "unknown"
        result = {
            "task": {"type": task},
            "dataset": {"name": run.data or dataset, "type": dataset},
            "metrics": [{"type": _metric_type(name), "value": value, "name": name} for name, value in metrics.items()],
        }
        name = run.repo_id.rpartition("/")[2] if run.repo_id else "lora"
        front["model-index"] = [{"name": name, "results": [result]}]
    for key, value in run.front_matter.items():
        front[key] = list(dict.fromkeys([*tags, *_list(value)])) if key == "tags" else value
    return front


def _metric_type(name: str) -> str:
    """`val_loss` is a loss: the Hub groups by what is measured."""
    return re.sub(r"^(val|validation|test|train|eval)[_/]", "", name) or name


def _table(config: Mapping[str, Any], base: str | None, modules: int, parameters: int, run: RunFacts) -> list[str]:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    rows: list[tuple[str, str]] = []
    if base:
        rows.append(("base model", f"`{base}`{_at(config.get('revision'))}"))
    rows += [
        ("rank", f"{rank}{_varied(config.get('rank_pattern'))}"),
        ("alpha", f"{alpha:g}{_varied(config.get('alpha_pattern'))}"),
        ("targets", _targets(config.get("target_modules"))),
        ("adapted modules", str(modules)),
        ("trained parameters", f"{parameters:,}"),
    ]
    if config.get("use_rslora"):
        rows.append(("scale", "alpha / sqrt(rank) (rsLoRA)"))
    if config.get("use_dora"):
        rows.append(("variant", "DoRA"))
    if config.get("alora_invocation_tokens"):
        rows.append(("variant", f"activated LoRA, by the tokens {config['alora_invocation_tokens']}"))
    if config.get("modules_to_save"):
        rows.append(("trained whole", ", ".join(f"`{name}`" for name in config["modules_to_save"])))
    if run.data:
        rows.append(("data", run.data))
    if run.step is not None:
        rows.append(("optimizer steps", f"{run.step:,}"))
    rows += run.notes.items()
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows if value)]


def _results(run: RunFacts) -> list[str]:
    metrics = {name: value for name, value in run.metrics.items() if math.isfinite(value)}
    if not metrics and not run.curve:
        return []
    lines = ["## Results"]
    if metrics:
        lines += ["", "| metric | value |", "|---|---|", *(_metric_row(name, value) for name, value in metrics.items())]
    if run.curve:
        lines += ["", f"![training curve]({run.curve})"]
    return lines


def _loading(config: Mapping[str, Any], base: str | None, module: str, run: RunFacts) -> list[str]:
    onto = f"`{base}`" if base else "the base model"
    within = f", or the LightningModule that holds it (as `{module}`)" if module else ""
    where = f'"{run.repo_id}"' if run.repo_id else "folder"
    means = "" if run.repo_id else "; `folder` is this folder"
    lines = ["## Load it", "", f"`model` is {onto}{within}{means}."]
    lines += _code("from lightning_lora import load_adapter", "", f"load_adapter(model, {where})")
    lines += ["", "With PEFT, onto the base model itself:"]
    lines += _code("from peft import PeftModel", "", f"model = PeftModel.from_pretrained(model, {where})")
    task = config.get("task_type")
    if base and task in TASKS:
        auto = TASKS[task][1]
        lines += ["", "With transformers:"]
        lines += _code(
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("{base}")',
            f"model.load_adapter({where})",
        )
    # vLLM reads plain low-rank pairs only.
    plain = not any(config.get(key) for key in _NOT_PLAIN)
    if base and task == "CAUSAL_LM" and plain and config.get("bias", "none") == "none":
        most = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
        limit = next((rank for rank in CONSUMERS["vllm"].limits if rank >= most), most)
        name = run.repo_id.rpartition("/")[2] if run.repo_id else "adapter"
        path = run.repo_id or "FOLDER"
        lines += ["", "With vLLM:"]
        command = f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {name}={path}"
        lines += _code(command, language="bash")
    return lines


_NOT_PLAIN = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "alora_invocation_tokens")


def _code(*lines: str, language: str = "python") -> list[str]:
    return ["", f"```{language}", *lines, "```"]


def _targets(targets: Any) -> str:
    if isinstance(targets, str):
        return f"`{targets}`" if len(targets) <= 60 else "a regular expression"
    names = [f"`{name}`" for name in targets or ()]
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:12])} and {len(names) - 12} more"


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _at(revision: str | None) -> str:
    return f" at `{revision}`" if revision else ""


def _varied(pattern: Mapping[str, Any] | None) -> str:
    return f" (others in {len(pattern)} modules)" if pattern else ""
