"""The card: what it says of an adapter, and whose text it keeps. What the Hub reads is read by the client here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from lightning_lora.engine import LoRAConfig
from lightning_lora.hub.card import RunFacts, merge_cards, model_card
from lightning_lora.hub.curve import curve_picture
from lightning_lora.hub.peft_config import to_peft


def config(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"base_model": "user/base", "task_type": "CAUSAL_LM", "modules_to_save": None}
    names = ["layers.0.q_proj", "layers.0.v_proj"]
    made = to_peft(
        LoRAConfig(rank=12, alpha=24),
        ranks=dict.fromkeys(names, 12),
        alphas=dict.fromkeys(names, 24.0),
        target_modules=["q_proj", "v_proj"],
        **{**fields, **{key: value for key, value in changes.items() if key in fields}},
    )
    return {**made, **{key: value for key, value in changes.items() if key not in fields}}


def card(run: RunFacts | None = None, **changes: Any) -> str:
    return model_card(config(**changes), modules=2, parameters=1234, module="model", run=run)


FACTS = RunFacts(
    repo_id="user/my-adapter",
    metrics={"val_loss": 0.25, "val_acc": 0.9, "broken": float("nan")},
    step=300,
    data="squad",
    datasets=["squad"],
    curve="training.png",
    front_matter={"license": "mit", "tags": ["latin"]},
)


def test_it_says_what_the_hub_reads() -> None:
    data = ModelCard(card(FACTS)).data
    assert data.library_name == "peft"
    assert data.base_model == "user/base"
    assert data.get("base_model_relation") == "adapter"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["base_model:adapter:user/base", "lora", "lightning-lora", "latin"]
    assert data.license == "mit"
    assert data.datasets == ["squad"]
    results = {result.metric_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"val_loss": 0.25, "val_acc": 0.9}
    assert results["val_acc"].metric_type == "acc"
    assert results["val_acc"].dataset_type == "squad"


def test_it_says_what_people_ask() -> None:
    text = card(FACTS)
    for row in (
        "| rank | 12 |",
        "| alpha | 24 |",
        "| targets | `q_proj`, `v_proj` |",
        "| trained parameters | 1,234 |",
    ):
        assert row in text
    assert "![training curve](training.png)" in text
    assert "| optimizer steps | 300 |" in text
    assert "nan" not in text


def test_its_examples_are_of_the_repository_and_of_the_base() -> None:
    text = card(FACTS)
    assert 'load_adapter(model, "user/my-adapter")' in text
    assert 'PeftModel.from_pretrained(model, "user/my-adapter")' in text
    assert 'AutoModelForCausalLM.from_pretrained("user/base")' in text
    assert "vllm serve user/base --enable-lora --max-lora-rank 16 --lora-modules my-adapter=user/my-adapter" in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["head"]}, {"task_type": "SEQ_CLS"}])
def test_vllm_is_not_promised_what_it_cannot(changes: dict[str, Any]) -> None:
    assert "vllm" not in card(FACTS, **changes)


@pytest.mark.parametrize("base", ["/home/ann/base", "./base", r"C:\base", "tests", None])
def test_a_local_path_is_never_the_base(base: str | None) -> None:
    text = card(FACTS, base_model=base)
    assert ModelCard(text).data.base_model is None
    assert "AutoModelForCausalLM" not in text
    assert base is None or f"`{base}`" not in text


def test_merging_a_card_with_itself_changes_nothing() -> None:
    assert merge_cards(card(FACTS), card(FACTS)) == card(FACTS)


def test_what_was_written_before_is_replaced_and_what_others_wrote_is_kept() -> None:
    old = card(RunFacts(repo_id="user/my-adapter", metrics={"val_loss": 0.75}, step=100))
    theirs = old.replace("library_name", "language: la\nlibrary_name", 1) + "\nMine.\n"
    merged = merge_cards(card(FACTS), theirs)
    assert "0.75" not in merged
    assert "| optimizer steps | 300 |" in merged
    assert merged.rstrip().endswith("Mine.")
    assert ModelCard(merged).data.language == "la"
    assert merge_cards(card(FACTS), merged) == merged


def test_a_card_without_our_marks_is_kept_whole_above_ours() -> None:
    merged = merge_cards(card(FACTS), "---\nlicense: apache-2.0\ntags: [mine]\n---\n# Title\n\nText.\n")
    assert merged.index("# Title") < merged.index("| rank | 12 |")
    data = ModelCard(merged).data
    assert data.license == "apache-2.0"
    assert data.tags == ["base_model:adapter:user/base", "lora", "lightning-lora", "latin", "mine"]


@pytest.mark.parametrize(
    "text", ["", "---\n---\n", "---\n: [\n---\nText.\n", "---\n- a\n---\nText.\n", "--- \r\na: 1\r\n---\r\nText."]
)
def test_any_text_can_be_merged(text: str) -> None:
    merged = merge_cards(card(FACTS), text)
    assert isinstance(ModelCard(merged).data, ModelCardData)
    assert ("Text." in merged) == ("Text." in text)


def test_a_local_base_in_somebody_elses_card_is_taken_out() -> None:
    theirs = "---\nbase_model: /home/ann/base\n---\n"
    assert "/home/ann" not in merge_cards(card(FACTS, base_model=None), theirs)
    assert "base_model: user/other" in merge_cards(
        card(FACTS, base_model=None), theirs.replace("/home/ann/base", "user/other")
    )


def test_the_curve_is_a_picture_once_there_are_two_points() -> None:
    assert curve_picture([(1, {"val_loss": 1.0})]) is None
    picture = curve_picture([(1, {"val_loss": 1.0, "val_acc": 0.1}), (2, {"val_loss": 0.5, "val_acc": float("inf")})])
    assert picture is not None
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("path", ["/home/me/base", "./base", "../models/base", "~/base", r"C:\\models\\base", "tests"])
@pytest.mark.parametrize("kind", ["adapter:", "finetune:", ""])
def test_no_path_of_the_machine_that_trained_is_told_by_what_peft_wrote(path: str, kind: str) -> None:
    theirs = f"---\nbase_model: {path}\ntags:\n- base_model:{kind}{path}\n- lora\n- mine\n---\n\nMy text.\n"
    merged = merge_cards(card(base_model=None), theirs)
    assert path not in merged
    assert ModelCard(merged).data.tags == ["lora", "lightning-lora", "mine"]
    assert "My text." in merged


def test_the_tag_of_a_base_on_the_hub_stays() -> None:
    theirs = "---\nbase_model: [user/base, /home/me/base]\ntags: ['base_model:adapter:user/base']\n---\n"
    data = ModelCard(merge_cards(card(base_model=None), theirs)).data
    assert data.base_model == ["user/base"]
    assert data.tags == ["lora", "lightning-lora", "base_model:adapter:user/base"]
