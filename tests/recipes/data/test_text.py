"""Text is packed without loss, and prompts are padded on the left."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data import DataSource, TextData
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import CausalLM

from .rows import Rows

TEXTS = ["hello", "", "a much longer text than the others are", "x", "last"]


def text_rows(texts: list[str | None]) -> Rows:
    return Rows([{"text": text} for text in texts])


def test_every_token_is_in_a_block_once_with_an_end_after_each_text(llama):
    data = TextData(llama, text_rows(TEXTS), block_size=8, batch_size=3)
    with pytest.warns(UserWarning, match=r"1 of 5 texts are empty or missing, and were left out"):
        data.setup("fit")
    tokens = [token for batch in data.val_dataloader() for row in batch["input_ids"] for token in row.tolist()]
    expected = [
        token for text in TEXTS if text for token in [*data.tokenizer(text, add_special_tokens=False).input_ids, 1]
    ]
    assert [token for token in tokens if token != 0] == expected
    batches = list(data.val_dataloader())
    assert all(batch["attention_mask"].all() for batch in batches[:-1])  # only the last block is padded
    last = batches[-1]
    assert torch.equal(last["labels"][last["attention_mask"] == 1], last["input_ids"][last["attention_mask"] == 1])
    assert (last["labels"][last["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(("around", "adds"), [("$A", ""), ("<s> $A", "<s>"), ("<s> $A </s>", "<s>")])
def test_a_text_begins_as_the_tokenizer_begins_it_and_ends_once(llama, monkeypatch, around, adds):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(around, special_tokens=special)
    monkeypatch.setattr(ModelSource, "tokenizer", lambda _: tokenizer)
    data = TextData(llama, text_rows(["a b", "b"]), block_size=100, prompt_length=2)
    data.setup("validate")
    (block,) = data._encoded["validation"]
    assert tokenizer.convert_ids_to_tokens(block["input_ids"]) == f"{adds} a b </s> {adds} b </s>".split()
    data.setup("predict")
    prompts = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in data._encoded["predict"]]
    assert prompts == [f"{adds} a b".split()[:2], f"{adds} b".split()[:2]]


def test_many_empty_texts_before_the_first_full_one_do_no_harm(llama):
    data = TextData(llama, text_rows([""] * 250 + ["text"]), block_size=5)
    with pytest.warns(UserWarning, match=r"validation: 250 of 251 texts are empty"):
        data.setup("validate")
    assert len(data.val_dataloader().dataset) == 1


@pytest.mark.parametrize(("length", "blocks"), [(7, [4, 4]), (8, [4, 4]), (9, [4, 4, 2])])
def test_a_single_last_token_makes_no_block(llama, length, blocks):
    # One token per letter, and the end.
    data = TextData(llama, text_rows(["x" * length]), block_size=4)
    data.setup("validate")
    assert [len(data._encoded["validation"][index]["input_ids"]) for index in range(len(blocks))] == blocks
    assert len(data._encoded["validation"]) == len(blocks)


def test_training_is_shuffled_by_the_global_seed_and_validation_is_not(llama):
    data = TextData(llama, text_rows(["abcdefghijklmnopqrstuvwxyz" * 4]), block_size=4, batch_size=1)
    data.setup("fit")

    def order(loader):
        return [tuple(batch["input_ids"][0].tolist()) for batch in loader]

    torch.manual_seed(1)
    first = order(data.train_dataloader())
    torch.manual_seed(1)
    assert order(data.train_dataloader()) == first != order(data.val_dataloader())
    assert sorted(first) == sorted(order(data.val_dataloader()))


def test_prompts_are_the_starts_of_the_texts_padded_on_the_left(llama):
    data = TextData(llama, text_rows(["abcdef", "xy"]), prompt_length=4)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["abcd", "xy"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_files_are_trained_on_and_continued_end_to_end(llama, trainer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {index}"}) + "\n" for index in range(30)))
    data = TextData(llama, DataSource(str(path)), block_size=16, batch_size=4)
    task = CausalLM(llama, max_new_tokens=3, learning_rate=1e-2)
    run = trainer(max_epochs=2)
    run.fit(task, data)
    assert run.callback_metrics["val_perplexity"] < 259
    assert sum(map(len, trainer().predict(task, data))) == 30


def test_worker_processes_and_copies_get_the_same_batches(llama):
    data = TextData(llama, text_rows(TEXTS[2:]), block_size=8)
    data.setup("validate")
    here = next(iter(data.val_dataloader()))
    copy = pickle.loads(pickle.dumps(data))
    copy.num_workers = 1
    there = next(iter(copy.val_dataloader()))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_the_batch_size_is_read_when_a_loader_is_made(llama):
    data = TextData(llama, text_rows(["x" * 100]), block_size=4, batch_size=2)
    data.setup("validate")
    data.batch_size = 5  # as the batch-size finder does
    assert len(next(iter(data.val_dataloader()))["input_ids"]) == 5


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(ConfigError, match=r"block_size 1"):
        TextData(llama, text_rows(TEXTS), block_size=1)
    with pytest.raises(ConfigError, match=r"batch_size 0"):
        TextData(llama, text_rows(TEXTS), batch_size=0)
    with pytest.raises(DataError, match=r"no column 'content'"):
        TextData(llama, text_rows(TEXTS), text_column="content").setup("fit")
    with pytest.raises(DataError, match=r"all empty"):
        TextData(llama, text_rows(["", None, ""])).setup("fit")
    with pytest.raises(DataError, match=r"must hold text, but there is int"):
        TextData(llama, text_rows([1, 2])).setup("fit")
    with pytest.raises(DataError, match=r"no test split"):
        TextData(llama, text_rows(TEXTS)).setup("test")
