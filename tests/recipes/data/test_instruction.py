"""Of a conversation, exactly what the assistant says is learned; packed, conversations do not see each other."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data import InstructionData, TextData
from lightning_lora.recipes.data.chat import PLAIN_TEMPLATE, ChatEncoder, template_of
from lightning_lora.recipes.data.instruction import pack
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import CausalLM

from .rows import Rows

PAIRS = [{"prompt": "Say " + "a" * n, "response": "b" * (n + 1)} for n in range(1, 9)]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello – you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
    {"role": "user", "content": "unanswered"},
]


def fast_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with offsets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_only_what_the_assistant_says_is_learned_in_every_turn(llama, kind):
    tokenizer = fast_tokenizer() if kind == "fast" else llama.tokenizer()
    assert tokenizer.is_fast == (kind == "fast")
    tokenizer.chat_template = PLAIN_TEMPLATE
    row = ChatEncoder(tokenizer, 1000, None, "messages", "", "", prompts=False)({"messages": CHAT})
    end = tokenizer.eos_token
    assert row["input_ids"] == tokenizer.apply_chat_template(CHAT[:5])["input_ids"]
    assert tokenizer.apply_chat_template(CHAT[:5], tokenize=False) == (
        f"Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello – you{end}"
        f"\n\n### Instruction:\nBye\n\n### Response:\nSee you{end}"
    )
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(learned) == f"Hello – you{end}See you{end}"
    assert row["learned"] == len(learned)
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))


def test_columns_of_prompts_and_responses_are_conversations_too(llama):
    data = InstructionData(llama, Rows(PAIRS), chat_template="plain", system_prompt="Be brief.")
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    first = data.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert first == "Be brief.\n\n### Instruction:\nSay a\n\n### Response:\nbb"
    assert data.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "bb</s>"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_prompts_end_where_the_answer_begins(llama):
    data = InstructionData(llama, Rows([{"messages": CHAT[:5]}]), chat_template="plain")
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert data.tokenizer.decode(batch["input_ids"][0]).endswith("### Instruction:\nBye\n\n### Response:\n")
    without_answers = InstructionData(llama, Rows([{"prompt": "Hi"}]), chat_template="plain")
    without_answers.setup("predict")
    row = next(iter(without_answers.predict_dataloader()))["input_ids"][0]
    assert without_answers.tokenizer.decode(row) == "### Instruction:\nHi\n\n### Response:\n"


def test_packed_conversations_have_the_very_losses_they_have_alone(llama):
    alone = InstructionData(llama, Rows(PAIRS), chat_template="plain", batch_size=1)
    packed = InstructionData(llama, Rows(PAIRS), chat_template="plain", batch_size=2, packing=True, max_length=130)
    for data in (alone, packed):
        data.setup("fit")
    task = CausalLM(llama)
    task.configure_model()
    task.model.eval()

    def losses(data):
        found = []
        for batch in data.val_dataloader():
            with torch.no_grad():
                logits = task(batch).logits[:, :-1]
            targets = batch["labels"][:, 1:]
            each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
            found += each[targets != -100].tolist()
        return sorted(found)

    assert len(packed.val_dataloader().dataset) < len(PAIRS)
    # The same sums in another order, in float32.
    assert losses(packed) == pytest.approx(losses(alone), rel=1e-4)


def test_packing_puts_each_row_into_one_group_that_has_room():
    lengths = [5, 9, 3, 3, 7, 1, 2, 10]
    groups = pack(lengths, 10)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 10 for group in groups)
    assert len(groups) == 4  # 40 tokens in rows of 10


def test_a_conversation_cut_before_its_answer_is_left_out_and_counted(llama):
    rows = [*PAIRS, {"prompt": "p" * 200, "response": "never read"}]
    data = InstructionData(llama, Rows(rows), chat_template="plain", max_length=100)
    with pytest.warns(UserWarning, match=r"validation: 1 of 9 conversations are longer.*1 have no answer to learn"):
        data.setup("validate")
    assert len(data.val_dataloader().dataset) == len(PAIRS)
    nothing = InstructionData(llama, Rows(PAIRS), chat_template="plain", max_length=10)
    with pytest.raises(DataError, match=r"None of the 8 .* conversations has an answer to learn within max_length=10"):
        nothing.setup("fit")


def test_nothing_is_said_where_nothing_is_cut(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InstructionData(llama, Rows(PAIRS), chat_template="plain").setup("fit")


def test_a_template_that_leaves_out_earlier_answers_is_refused(llama):
    template = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"does not write everything that the assistant says"):
        InstructionData(llama, Rows([{"messages": CHAT}]), chat_template=template).setup("fit")


def test_a_tokenizer_without_a_template_says_what_to_give(llama):
    with pytest.raises(DataError, match=r"has no chat template. Give chat_template: plain"):
        InstructionData(llama, Rows(PAIRS))
    tokenizer = llama.tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    assert template_of(tokenizer, None) == "{{ messages }}"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?"}, "no column 'messages'.*question.*or prompt_column and response_column"),
        ({"messages": "text"}, "must hold lists of messages"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, r"this one has the roles \['user'\]"),
        ({"prompt": "Hi", "response": 3}, "not text but 3"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(llama, row, said):
    with pytest.raises(DataError, match=said):
        InstructionData(llama, Rows([row]), chat_template="plain").setup("fit")


ALPACA = {"instruction": "Add", "input": "1 and 2", "output": "3"}
SHAPES = [
    ([ALPACA], [("user", "Add\n\n1 and 2"), ("assistant", "3")]),
    ([{**ALPACA, "input": ""}], [("user", "Add"), ("assistant", "3")]),
    ([{"instruction": "Hi", "output": "Yes"}], [("user", "Hi"), ("assistant", "Yes")]),
    (
        [{**ALPACA, "input": None, "system": "Be kind.", "history": [["Hi", "Hello"]], "text": "all of it"}],
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add"), ("assistant", "3")],
    ),
    (
        [{"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        [{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        [
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            }
        ],
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        [{"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        [{"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]}],
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    ([{"prompt": "Hi", "completion": "Hello"}], [("user", "Hi"), ("assistant", "Hello")]),
    (
        [{"prompt": CHAT[:2], "completion": CHAT[2:3]}],
        [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello – you")],
    ),
]


@pytest.mark.parametrize(("rows", "messages"), SHAPES)
def test_a_common_shape_is_taken_by_the_names_of_its_columns(llama, rows, messages):
    own = [{"messages": [{"role": role, "content": text} for role, text in messages]}]
    for stage, split in (("fit", "train"), ("predict", "predict")):
        batches = []
        for given in (rows, own):
            data = InstructionData(llama, Rows(given * 4), chat_template="plain")
            data.setup(stage)
            batches.append(next(iter(getattr(data, f"{split}_dataloader")())))
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, "one of human, user, gpt"),
        ({"conversations": [{"from": "human", "value": None}]}, "value .a text."),
        ({"conversations": "Hi"}, "conversations must be a list of messages"),
        ({"messages": [{"speaker": "A", "text": "Hi"}]}, "lists of messages with role and content .or from and value."),
        ({"messages": [{"from": "alien", "value": "Hi"}]}, "one of human, user, gpt"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "is JSON with name and arguments, and not"),
        ({"instruction": 3, "output": "x"}, "instruction must be text"),
        ({"instruction": "x", "output": None}, "needs a user and an assistant"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "history holds pairs"),
        (
            {"conversations": [], "instruction": "x", "output": "y"},
            "several shapes: alpaca .instruction, output., share",
        ),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "Needed are messages_column.*taken: instruction"),
    ],
)
def test_what_is_no_such_shape_is_an_error_that_names_it(llama, row, said):
    data = InstructionData(llama, Rows([row] * 4), chat_template="plain")
    with pytest.raises(DataError, match=said):
        data.setup("fit")


def test_a_column_that_was_named_is_not_replaced_by_a_shape(llama):
    data = InstructionData(llama, Rows([ALPACA] * 4), messages_column="chat", chat_template="plain")
    with pytest.raises(DataError, match="no column 'chat'"):
        data.setup("fit")


def short_llama(llama, tmp_path, context: int) -> ModelSource:
    config = llama.load("AutoModelForCausalLM").config
    config.max_position_embeddings = context
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    llama.tokenizer().save_pretrained(tmp_path)
    return ModelSource(str(tmp_path))


def test_conversations_longer_than_the_model_reads_are_cut_and_counted(llama, trainer, tmp_path):
    short = short_llama(llama, tmp_path, context=60)
    rows = [{"prompt": "Hi", "response": "x" * 20}, {"prompt": "Hi", "response": "x" * 99}]
    said = r"1 of 2 conversations are longer than 60 tokens, all that the model knows .max_length=1024. and were cut"
    for packing in (False, True):
        data = InstructionData(short, Rows(rows), chat_template="plain", packing=packing)
        with pytest.warns(UserWarning, match=said):
            data.setup("validate")
        trainer().validate(CausalLM(short), data.val_dataloader(), verbose=False)
        positions = next(iter(data.val_dataloader())).get("position_ids")
        assert positions is None or int(positions.max()) == 59
    with pytest.raises(ConfigError, match="block_size is 256, and the model reads at most 60 tokens"):
        TextData(short, Rows(rows))


def test_prompts_longer_than_the_model_reads_are_cut_at_their_start(llama, trainer, tmp_path):
    short = short_llama(llama, tmp_path, context=60)
    data = InstructionData(short, Rows([{"prompt": "y" * 70 + "end"}]), chat_template="plain", max_length=50)
    with pytest.warns(
        UserWarning, match=r"1 of 1 prompts are longer than max_length=50 tokens; their ends are answered"
    ):
        data.setup("predict")
    (rows,) = trainer().predict(CausalLM(short, max_new_tokens=10), data.predict_dataloader())
    assert rows[0]["prompt"].endswith("end\n\n### Response:\n")
    with pytest.raises(ConfigError, match=r"A prompt of 50 tokens and max_new_tokens=11 are more than the 60"):
        trainer().predict(CausalLM(short, max_new_tokens=11), data.predict_dataloader())


def test_the_plain_template_begins_as_the_tokenizer_begins_a_text():
    tokenizer = fast_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    assert template_of(tokenizer, "plain") == PLAIN_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<begin> $A", special_tokens=[("<begin>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template_of(tokenizer, "plain")
    row = ChatEncoder(tokenizer, 1000, None, "messages", "", "", prompts=False)({"messages": CHAT[1:3]})
    text = "### Instruction:\nHi\n\n### Response:\nHello – you<end>"
    assert row["input_ids"] == tokenizer(text)["input_ids"]
    assert row["labels"][0] == -100


def test_of_a_prompt_with_earlier_answers_the_completion_alone_is_learned(llama):
    rows = [
        {"prompt": CHAT[1:4], "completion": [CHAT[4]]},
        {"conversations": [*CHAT[1:2], {"from": "gpt", "value": "Hello", "weight": 0}, *CHAT[3:5]]},
    ]
    for row in rows:
        data = InstructionData(llama, Rows([row]), chat_template="plain")
        data.setup("validate")
        labels = next(iter(data.val_dataloader()))["labels"]
        assert data.tokenizer.decode(labels[labels != -100]) == "See you</s>"
