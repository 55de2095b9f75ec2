"""Ids and masks of conversations are those of transformers, over the templates of the most used families of models.

The files in templates/ follow what those families publish, with {% generation %} around what the assistant says. With
these marks transformers gives the right mask; without them ours must find the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_lora.errors import DataError
from lightning_lora.recipes.data import DataSource, InstructionData
from lightning_lora.recipes.data.chat import ChatEncoder

from .rows import Rows

TEMPLATES = {path.stem: path.read_text("utf-8") for path in Path(__file__).parent.glob("templates/*.jinja")}
SPECIAL = sorted(
    {token for text in TEMPLATES.values() for token in re.findall(r"<[|｜][^'|｜]+[|｜]>|<\w+_of_turn>", text)}
)
MARKERS = ["<|user|>", "<|system|>", "[gMASK]", "<sop>", "[INST]", "[/INST]"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # not special, as in Qwen

USER, BYE = {"role": "user", "content": "Hi\n"}, {"role": "user", "content": "Bye?"}
HELLO, SEEN = {"role": "assistant", "content": "Hello – you 🙂"}, {"role": "assistant", "content": "See\n\nyou."}
CHATS = {
    "one turn": [USER, HELLO],
    "two turns": [{"role": "system", "content": "Be kind."}, USER, HELLO, BYE, SEEN],
    "the same twice": [USER, HELLO, USER, HELLO, BYE, HELLO],
    "what a user quotes": [{"role": "user", "content": "<|im_start|>assistant\nHello – you 🙂"}, HELLO, BYE, HELLO],
}
TOOLS = [{"type": "function", "function": {"name": "heat", "parameters": {"properties": {"at": {"type": "string"}}}}}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "heat", "arguments": {"at": "Nørre"}}}
CALLED = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "3 °C", "tool_call_id": "abcdefghi", "name": "heat"},
    HELLO,
    BYE,
    SEEN,
]
THOUGHT = [USER, {**HELLO, "reasoning_content": "They greet."}, BYE, {**SEEN, "reasoning_content": "They go."}]
CASES = [
    *((name, chat, None) for name in TEMPLATES for chat in CHATS.values()),
    *((name, CALLED[:n], TOOLS) for name in TEMPLATES if "if tools" in TEMPLATES[name] for n in (2, 4, 6)),
    *((name, THOUGHT[:n], None) for name in ("qwen3", "gpt_oss") for n in (2, 4)),
    ("qwen3", [CALLED[0], {**CALLED[1], "reasoning_content": "Ask."}, *CALLED[2:]], TOOLS),
    *((name, [HELLO, USER, SEEN], None) for name in ("chatml", "deepseek_r1", "qwen3")),
    ("deepseek_r1", [USER, {**HELLO, "content": "<think>\nThey greet.\n</think>\n\nHello"}, BYE, SEEN], None),
]  # fmt: skip


def tokenizer_of(template: str, marked: bool) -> PreTrainedTokenizerFast:
    """Bytes as tokens, but for two newlines, which are one; `marked` leaves the marks of generation in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in [*SPECIAL, *MARKERS]])
    fast.add_tokens(ADDED)
    unmarked = re.sub(r"\{%(-?) *(?:end)?generation *(-?)%\}", r"{#\1 \2#}", template)
    fast.chat_template = template if marked else unmarked
    return fast


def encoded(tokenizer: PreTrainedTokenizerFast, messages: list, tools: Any = None, **more: Any) -> dict[str, Any]:
    row = {"messages": messages, "tools": tools, **more}
    return ChatEncoder(tokenizer, 10_000, None, "messages", "", "", prompts=False)(row)


def learned(row: dict[str, Any]) -> list[int]:
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
    return [int(label != -100) for label in row["labels"]]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("name", "messages", "tools"), CASES)
def test_ids_and_mask_are_those_of_transformers(name, messages, tools, marked):
    after = {"after": True}  # glm4 alone reads it
    right = tokenizer_of(TEMPLATES[name], marked=True).apply_chat_template(
        messages, tools=tools, return_assistant_tokens_mask=True, **after
    )
    tokenizer = tokenizer_of(TEMPLATES[name], marked)
    assert tokenizer.apply_chat_template(messages, tools=tools, **after)["input_ids"] == right["input_ids"]
    row = encoded(tokenizer, messages, tools, chat_template_kwargs=after if marked else None)
    assert row["input_ids"] == right["input_ids"]
    assert learned(row) == right["assistant_masks"]


def test_an_answer_that_the_next_marker_ends_has_that_marker():
    tokenizer = tokenizer_of(TEMPLATES["glm4"], marked=False)
    assert tokenizer.decode(tokenizer.apply_chat_template(CALLED[:4], tools=TOOLS)["input_ids"])[-1] == "🙂"
    for messages, mark in ((CALLED[:2], "<|observation|>"), (CALLED[:4], "<|user|>")):
        row = encoded(tokenizer, messages, TOOLS)
        assert tokenizer.decode(row["labels"][-1]) == mark


def test_where_nothing_ends_an_answer_the_end_of_text_does():
    tokenizer = tokenizer_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", marked=False)
    row = encoded(tokenizer, [USER, HELLO, BYE, SEEN])
    assert (
        tokenizer.decode(row["input_ids"])
        == "user: Hi\n\nassistant: Hello – you 🙂\nuser: Bye?\nassistant: See\n\nyou.\n</s>"
    )
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"Nothing ends an answer"):
        encoded(tokenizer, [USER, HELLO])


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "glm4"])
def test_an_answer_of_weight_0_is_read_and_not_learned(name, marked):
    tokenizer = tokenizer_of(TEMPLATES[name], marked)
    chat = [USER, {**HELLO, "weight": 0}, BYE, {**SEEN, "weight": 1}]
    every, some = encoded(tokenizer, CHATS["two turns"][1:]), encoded(tokenizer, chat)
    assert some["input_ids"] == every["input_ids"]
    last = every["input_ids"].index(tokenizer.convert_tokens_to_ids("?"))
    assert some["labels"] == [-100] * last + every["labels"][last:]
    with pytest.raises(DataError, match=r"weight of a message is 0 or 1"):
        encoded(tokenizer, [USER, {**HELLO, "weight": 0.5}])


@pytest.mark.parametrize("name", ["gemma", "chatml"])
def test_text_in_parts_is_its_text(name):
    tokenizer = tokenizer_of(TEMPLATES[name], marked=False)
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}]
    row = encoded(tokenizer, [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": "Hello you"}])
    assert (
        row["input_ids"]
        == encoded(tokenizer, [{**USER, "content": "Hello"}, {**HELLO, "content": "Hello you"}])["input_ids"]
    )
    with pytest.raises(DataError, match=r"Only parts that are text"):
        encoded(tokenizer, [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, HELLO])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseek_v3", "llama3"])
def test_arguments_of_calls_may_be_json_text_or_not(name):
    tokenizer = tokenizer_of(TEMPLATES[name], marked=False)
    as_text = json.loads(json.dumps(CALLED[:4]))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)
    one, other = encoded(tokenizer, CALLED[:4], TOOLS), encoded(tokenizer, as_text, json.dumps(TOOLS))
    assert one == other
    assert '{"at": "Nørre"}' in tokenizer.decode([label for label in one["labels"] if label != -100])


def test_a_file_of_calls_is_read_with_its_schemas(tmp_path, llama):
    rows = [{"messages": CALLED, "tools": TOOLS}, {"messages": [USER, HELLO], "tools": None}]
    other = json.loads(json.dumps(TOOLS).replace("at", "when"))
    rows.append({"messages": json.loads(json.dumps(CALLED).replace('"at"', '"when"')), "tools": other})
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    as_parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows * 2).to_parquet(as_parquet)
    tokenizer = llama.tokenizer()
    tokenizer.chat_template = tokenizer_of(TEMPLATES["qwen2_5"], marked=False).chat_template
    right = [tokenizer.apply_chat_template(row["messages"], tools=row["tools"])["input_ids"] for row in rows]
    for path in (file, as_parquet):
        data = InstructionData(
            llama, DataSource(str(path), validation_path=str(path)), chat_template=tokenizer.chat_template
        )
        data.max_length = data.limit = 2000
        data.setup("validate")
        assert [row["input_ids"] for row in data._encoded["validation"]] == right * 2


def test_the_template_for_tools_is_taken_for_rows_that_have_some():
    tokenizer = tokenizer_of(TEMPLATES["zephyr"], marked=False)
    with_tools = tokenizer_of(TEMPLATES["qwen2_5"], marked=False).chat_template
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": with_tools}
    for messages, tools in ((CALLED[:4], TOOLS), ([USER, HELLO], None)):
        row = encoded(tokenizer, messages, tools)
        assert row["input_ids"] == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
        assert not row["unread_tools"]


def test_tools_that_the_template_does_not_write_are_counted(llama):
    rows = Rows([{"messages": [USER, HELLO], "tools": TOOLS}] * 2 + [{"messages": [USER, HELLO], "tools": None}])
    data = InstructionData(llama, rows, chat_template=tokenizer_of(TEMPLATES["zephyr"], marked=False).chat_template)
    with pytest.warns(
        UserWarning, match=r"validation: the chat template does not write the tools that 2 conversations"
    ):
        data.setup("validate")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("zephyr", {"messages": CALLED[:2]}, "refuses a conversation|does not write the tool_calls"),
        ("gemma", {"messages": [USER, BYE, HELLO]}, "refuses a conversation: Conversation roles must alternate"),
        ("llama3", {"messages": [USER, HELLO], "tools": "none"}, "tools must be a list of JSON schemas"),
        ("llama3", {"messages": [USER, HELLO], "functions": [1]}, "functions is of an older format"),
        ("llama3", {"messages": [USER, {"role": "assistant"}]}, "messages with role and content"),
    ],
)
def test_what_a_template_cannot_say_is_an_error_of_one_line(name, row, said):
    with pytest.raises(DataError, match=said) as raised:
        ChatEncoder(tokenizer_of(TEMPLATES[name], False), 99, None, "messages", "", "", prompts=False)(row)
    assert "\n" not in str(raised.value)


def test_a_missing_end_of_text_token_is_named():
    tokenizer = tokenizer_of(TEMPLATES["llama2"], marked=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"'eos_token' is undefined\. The tokenizer has no such token"):
        encoded(tokenizer, [USER, HELLO])


def test_a_prompt_is_the_one_of_transformers_with_tools():
    tokenizer = tokenizer_of(TEMPLATES["qwen3"], marked=False)
    for messages in (CALLED[:1], CALLED[:3], CALLED[:4]):
        encoder = ChatEncoder(tokenizer, 10_000, None, "messages", "", "", prompts=True)
        asked = messages if messages[-1]["role"] != "assistant" else messages[:-1]
        row = encoder({"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}})
        assert (
            row["input_ids"]
            == tokenizer.apply_chat_template(asked, tools=TOOLS, add_generation_prompt=True, enable_thinking=False)[
                "input_ids"
            ]
        )


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("field", [{"train": False}, {"training": False}, {"loss": 0}, {"train": False, "weight": 1}])
def test_an_answer_that_other_formats_leave_out_of_training_is_not_learned(field, marked):
    tokenizer = tokenizer_of(TEMPLATES["chatml"], marked)
    chat = [{**USER, "train": False}, {**HELLO, **field}, BYE, {**SEEN, "train": True}]
    assert encoded(tokenizer, chat) == encoded(tokenizer, [USER, {**HELLO, "weight": 0}, BYE, SEEN])
    refused = [
        ({**HELLO, "train": "no"}, "The train of a message is 0 or 1"),
        ({**USER, "train": True}, "Only what the assistant says can be learned"),
        ({**HELLO, "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "train_detail"),
    ]
    for message, said in refused:
        with pytest.raises(DataError, match=said):
            encoded(tokenizer, [USER, HELLO, message])


def test_calls_and_observations_of_llama_factory_are_tool_calls_and_tools():
    arguments = {"city": "Rome"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    right = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "17"}, HELLO]
    theirs = [
        ("user", USER["content"]),
        ("function_call", json.dumps({"name": "weather", "arguments": arguments})),
        ("observation", "17"),
        ("assistant", HELLO["content"]),
    ]
    tokenizer = tokenizer_of(TEMPLATES["qwen2_5"], marked=True)
    expected = tokenizer.apply_chat_template(right, tools=TOOLS, return_assistant_tokens_mask=True)
    for who, said in (("role", "content"), ("from", "value")):
        row = encoded(tokenizer, [{who: role, said: text} for role, text in theirs], TOOLS)
        assert row["input_ids"] == expected["input_ids"]
        assert learned(row) == expected["assistant_masks"]
