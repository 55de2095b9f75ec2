"""The README.md of an adapter folder: what it is, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], *, modules: int, parameters: int, module: str) -> str:
    """The card of an adapter from its `adapter_config.json`; `parameters` counts what was trained, `module` is the
    name of the base inside the model that was trained, or ""."""
    base = config["base_model_name_or_path"]
    lines = ["---", "library_name: peft"]
    if base:
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- lora", "- lightning-lora", "---", "", "# LoRA adapter", ""]
    lines += ["| | |", "|---|---|"]
    if base:
        lines.append(f"| base model | `{base}`{_at(config['revision'])} |")
    lines += [
        f"| rank | {config['r']}{_varied(config['rank_pattern'])} |",
        f"| alpha | {config['lora_alpha']:g}{_varied(config['alpha_pattern'])} |",
        f"| adapted modules | {modules} |",
        f"| trained parameters | {parameters:,} |",
    ]
    if config["use_rslora"]:
        lines.append("| scale | alpha / sqrt(rank) (rsLoRA) |")
    if config["modules_to_save"]:
        lines.append(f"| trained whole | {', '.join(f'`{name}`' for name in config['modules_to_save'])} |")
    onto = f"`{base}`" if base else "the base model"
    within = f", or the LightningModule that holds it (as `{module}`)" if module else ""
    lines += [
        "",
        "## Load it",
        "",
        f"`model` is {onto}{within}; `folder` is this folder.",
        "",
        "```python",
        "from lightning_lora import load_adapter",
        "",
        "load_adapter(model, folder)",
        "```",
        "",
        "With PEFT, onto the base model itself:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(model, folder)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _at(revision: str | None) -> str:
    return f" at `{revision}`" if revision else ""


def _varied(pattern: Mapping[str, Any]) -> str:
    return f" (others in {len(pattern)} modules)" if pattern else ""
