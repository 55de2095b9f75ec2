"""The card: what it says of an adapter, and whose text it keeps. What the Hub reads is read by the client here."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_update

from lightning_lora.engine import LoRAConfig
from lightning_lora.format.config import to_peft
from lightning_lora.hub.card import RunFacts, merge_cards, model_card


def config(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"base_model_name_or_path": "user/base", "task_type": "CAUSAL_LM", "modules_to_save": None}
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
    text = card(FACTS, base_model_name_or_path=base)
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
    assert "/home/ann" not in merge_cards(card(FACTS, base_model_name_or_path=None), theirs)
    assert "base_model: user/other" in merge_cards(
        card(FACTS, base_model_name_or_path=None), theirs.replace("/home/ann/base", "user/other")
    )


@pytest.mark.parametrize("path", ["/home/me/base", "./base", "../models/base", "~/base", r"C:\\models\\base", "tests"])
@pytest.mark.parametrize("kind", ["adapter:", "finetune:", ""])
def test_no_path_of_the_machine_that_trained_is_told_by_what_peft_wrote(path: str, kind: str) -> None:
    theirs = f"---\nbase_model: {path}\ntags:\n- base_model:{kind}{path}\n- lora\n- mine\n---\n\nMy text.\n"
    merged = merge_cards(card(base_model_name_or_path=None), theirs)
    assert path not in merged
    assert ModelCard(merged).data.tags == ["lora", "lightning-lora", "mine"]
    assert "My text." in merged


def test_the_tag_of_a_base_on_the_hub_stays() -> None:
    theirs = "---\nbase_model: [user/base, /home/me/base]\ntags: ['base_model:adapter:user/base']\n---\n"
    data = ModelCard(merge_cards(card(base_model_name_or_path=None), theirs)).data
    assert data.base_model == ["user/base"]
    assert data.tags == ["lora", "lightning-lora", "base_model:adapter:user/base"]


THEIR_RESULT = {
    "task": {"type": "text-generation", "name": "Text Generation"},
    "dataset": {"type": "hellaswag", "name": "HellaSwag", "config": "en", "split": "test"},
    "metrics": [{"type": "acc", "value": 0.5, "name": "accuracy"}],
    "source": {"name": "A leaderboard", "url": "https://example.org"},
}


def with_results(text: str, *results: Any, metric: Any = None) -> str:
    """`text` as somebody edits it who adds to its model-index."""
    data = ModelCard(text)
    front = yaml.safe_load(text.split("---")[1])
    index = front.setdefault("model-index", [{"name": "x", "results": []}])[0]["results"]
    index += results
    if metric is not None:
        index[0]["metrics"].append(metric)
    return f"---\n{yaml.safe_dump(front)}---\n{data.text}"


def measured(text: str) -> set[Any]:
    results = ModelCard(text).data.eval_results or []
    return {(r.dataset_type, r.dataset_split, r.source_name, r.metric_name, r.metric_value) for r in results}


def test_what_others_measured_stays_and_what_an_earlier_push_measured_goes() -> None:
    first = card(replace(FACTS, metrics={"val_loss": 0.75, "old": 1 / 3}))
    by_hand = {"type": "bleu", "value": 20, "name": "by hand"}
    edited = with_results(first, THEIR_RESULT, metric=by_hand)
    expected = {
        ("hellaswag", "test", "A leaderboard", "accuracy", 0.5),
        ("squad", None, None, "by hand", 20),
        ("squad", None, None, "val_loss", 0.25),
        ("squad", None, None, "val_acc", 0.9),
    }
    merged = merge_cards(card(FACTS), edited)
    assert measured(merged) == expected
    assert merge_cards(card(FACTS), merged) == merged
    nothing = card(replace(FACTS, metrics={}))
    assert measured(merge_cards(nothing, merged)) == {row for row in expected if not row[3].startswith("val")}
    assert measured(merge_cards(nothing, first)) == set()


def test_a_value_of_the_same_measurement_is_replaced_as_the_hubs_client_does() -> None:
    """What `metadata_update` makes of the two, where the card that is there is not ours."""
    theirs = "---\nlicense: mit\n---\nText.\n"
    ours = ModelCard(card(FACTS)).data.to_dict()["model-index"]
    stale = copy.deepcopy(ours[0]["results"][0])
    stale["metrics"][0]["value"] = 9.0
    theirs = with_results(theirs, stale, THEIR_RESULT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCard, "load", classmethod(lambda cls, *args, **kwargs: ModelCard(theirs)))
        patch.setattr(ModelCard, "push_to_hub", lambda self, *args, **kwargs: str(self))
        updated = metadata_update("user/my-adapter", {"model-index": ours}, overwrite=True)
    assert measured(merge_cards(card(FACTS), theirs)) == measured(updated)


@pytest.mark.parametrize("index", ["text", [1], [{"name": "x"}], [{"results": [{"metrics": 1}]}], {"a": 1}])
def test_what_is_no_model_index_does_not_stop_a_push(index: Any) -> None:
    merged = merge_cards(card(FACTS), f"---\n{yaml.safe_dump({'model-index': index, 'license': 'mit'})}---\n")
    assert {row[4] for row in measured(merged)} == {0.25, 0.9}


def test_what_the_user_gives_now_is_stronger_than_what_the_card_says_and_no_more_than_that() -> None:
    theirs = "---\nlicense: mit\nlanguage: [la]\ntags: [mine]\npipeline_tag: text-classification\n---\n"
    facts = replace(FACTS, front_matter={"license": "apache-2.0", "tags": ["latin"]})
    data = ModelCard(merge_cards(card(facts), theirs, explicit=facts.front_matter)).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["la"], "text-classification")
    assert {"latin", "mine"} <= set(data.tags)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_front_matter_of_editors_and_languages_is_kept(mark: str, end: str) -> None:
    theirs = f"{mark}---\nlicense: mit\nlanguage:\n- no\n- en\ninference: false\n---\nText.\n".replace("\n", end)
    merged = merge_cards(card(replace(FACTS, front_matter={})), theirs)
    front = yaml.safe_load(merged.split("---")[1])
    assert (front["license"], front["language"], front["inference"]) == ("mit", ["no", "en"], False)
    assert "Text." in merged
    assert "\ufeff" not in merged
