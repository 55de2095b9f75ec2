"""Train the embedded base model again: `python tools/train_base.py --out DIR`.

A byte-level Llama of 2.8 million parameters learns Python's documentation topics. The folder that comes out holds
everything: config, weights, tokenizer, the log of the run and a model card with its figures. It is written beside
its place and renamed when complete.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from base_corpus import documentation_topics, source_sample
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_lora.embedded import BASE

CONTEXT = 512  # bytes
BATCH = 16  # windows of CONTEXT bytes per step
STEPS = 900
LEARNING_RATE = 2e-3
WARMUP = 0.08  # share of the steps
WEIGHT_DECAY = 0.1
RESIDUAL_DROPOUT = 0.1
VALIDATE_EVERY = 50  # steps

# 0..255 are the bytes themselves.
BOS, EOS, PAD = 256, 257, 258
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: \
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}\
{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}Assistant: {% endif %}"""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose id is the byte: 256 of them, then `<|bos|>`, `<|eos|>` and `<|pad|>`.

    It adds no special token by itself.
    """
    # A byte-pair encoding without a single pair. Its alphabet writes each byte as one visible character: printable
    # Latin-1 stands for itself, the rest follow from 256 on (GPT-2's table).
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    vocabulary = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def untrained_model() -> LlamaForCausalLM:
    """Return the architecture with random weights in float32, on the global random state."""
    return LlamaForCausalLM(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=259,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            # What from_pretrained makes of the bfloat16 file: adapters and full fine-tuning then run in full
            # precision on any CPU, unless the caller asks for another dtype.
            dtype="float32",
        )
    )


@torch.no_grad()
def loss_per_byte(model: nn.Module, texts: Iterable[bytes], window: int = CONTEXT) -> float:
    """Mean cross-entropy in nats per predicted byte; exp of it is the perplexity.

    Each text is cut into windows of `window` bytes which start without context; the first byte of each is not counted.
    """
    was_training = model.training
    model.eval()
    windows = [text[start : start + window] for text in texts for start in range(0, len(text), window)]
    total, count = 0.0, 0
    by_length: dict[int, list[bytes]] = {}
    for piece in windows:
        if len(piece) > 1:
            by_length.setdefault(len(piece), []).append(piece)
    for pieces in by_length.values():
        for start in range(0, len(pieces), BATCH):
            ids = torch.tensor([list(piece) for piece in pieces[start : start + BATCH]])  # (windows, bytes)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
    model.train(was_training)
    return total / count


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of `LEARNING_RATE`."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, steps: int, seed: int) -> list[dict[str, float]]:
    """Train `model` in place, leave the weights of the lowest validation loss in it, and return the log's rows."""
    topics = documentation_topics()
    documents = [[BOS, *text.encode(), EOS] for text in topics.train.values()]
    stream = torch.tensor([token for document in documents for token in document])  # (bytes,)
    held_back = [text.encode() for text in topics.held_back.values()]
    source = source_sample()

    # Llama has no residual dropout of its own; without it so small a corpus is learnt by heart.
    hooks = [
        part.register_forward_hook(lambda module, _, output: dropout(output, RESIDUAL_DROPOUT, module.training))
        for layer in model.model.layers
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    choose = torch.Generator().manual_seed(seed)
    rows: list[dict[str, float]] = []
    best = float("inf")
    best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses: list[float] = []
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts = torch.randint(len(stream) - CONTEXT + 1, (BATCH, 1), generator=choose)
        ids = stream[starts + torch.arange(CONTEXT)]  # (BATCH, CONTEXT)
        # On CPUs with bfloat16 units a step takes three quarters of its float32 time; the optimizer stays in float32.
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % VALIDATE_EVERY and step + 1 < steps:
            continue
        row = {
            "step": step + 1,
            "learning_rate": learning_rate(step, steps),
            "train_loss": sum(losses) / len(losses),
            "val_loss": loss_per_byte(model, held_back),
            "source_loss": loss_per_byte(model, source),
            "seconds": time.monotonic() - started,
        }
        rows.append(row)
        losses.clear()
        if row["val_loss"] < best:
            best = row["val_loss"]
            best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        print(
            f"step {step + 1:>5}/{steps}  train {row['train_loss']:.3f}  validation {row['val_loss']:.3f}  "
            f"source {row['source_loss']:.3f}  {row['seconds']:.0f} s",
            flush=True,
        )
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_weights)
    return rows


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, tokenizer and the weights as bfloat16 into `folder`."""
    model.config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    described = folder / "tokenizer_config.json"
    # transformers 5 writes its own new name for the class, which transformers 4 does not know; both know this one.
    fields = json.loads(described.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    described.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_log(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Write `rows` as CSV; losses are in nats per byte."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.6g}" for name, value in row.items()})


def model_card(model: LlamaForCausalLM, folder: Path, rows: Sequence[dict[str, float]], seed: int, steps: int) -> str:
    """Return the card's text; its figures are measured on the weights as they lie in `folder`."""
    topics = documentation_topics()
    learnt = "".join(topics.train.values()).encode()
    held_back = [text.encode() for text in topics.held_back.values()]
    source = source_sample()
    stored = copy.deepcopy(model)
    stored.load_state_dict(load_file(folder / "model.safetensors"))  # bfloat16 into float32
    docs, exact_docs = loss_per_byte(stored, held_back), loss_per_byte(model, held_back)
    code, exact_code = loss_per_byte(stored, source), loss_per_byte(model, source)
    best = min(rows, key=lambda row: row["val_loss"])
    return f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The embedded base of lightning_lora

A byte-level causal language model of {model.num_parameters():,} parameters, small enough to ship in a package and to
fine-tune on two CPU cores. It has learnt English prose about Python, with the short examples in it, and not Python's
source: adapting it to source is a real change of domain. It is for trying and testing adapters, and for nothing else:
it knows no facts and follows no instructions.

- **Architecture**: Llama, {model.config.num_hidden_layers} layers, width {model.config.hidden_size}, \
{model.config.num_attention_heads} heads, context {CONTEXT} bytes, untied head.
  Weights are stored in bfloat16 and load as float32 (`dtype` in config.json).
- **Tokenizer**: the id is the byte (0 to 255), then `<|bos|>` {BOS}, `<|eos|>` {EOS}, `<|pad|>` {PAD}. It adds none of
  them by itself. Its chat template writes `User: ...` and `Assistant: ...` lines and marks the assistant's part.
- **Data**: the documentation topics in `pydoc_data.topics` of Python {platform.python_version()}, \
without repeated paragraphs:
  {len(topics.train)} topics, {len(learnt):,} bytes (SHA-256 starts with `{hashlib.sha256(learnt).hexdigest()[:16]}`);
  {len(topics.held_back)} more topics, {sum(map(len, held_back)):,} bytes, held back.
  The text is the Python Software Foundation's, under the PSF licence; it is not in this folder.
- **Command**: `python tools/train_base.py --seed {seed} --steps {steps} --out DIR`
  with torch {torch.__version__.split("+")[0]}, transformers {transformers.__version__}, \
{torch.get_num_threads()} CPU threads, bfloat16 autocast: {rows[-1]["seconds"] / 60:.0f} minutes.
  Another CPU or version rounds differently and ends near by.
- **Training**: AdamW, {steps} steps of {BATCH} x {CONTEXT} bytes, learning rate {LEARNING_RATE:g} (warm-up, cosine),
  weight decay {WEIGHT_DECAY:g}, residual dropout {RESIDUAL_DROPOUT:g}. Kept: the weights of step \
{best["step"]:.0f}, with the lowest validation loss.
  `train_log.csv` has the losses in nats per byte.

| text | nats per byte | perplexity per byte | the same before rounding to bfloat16 |
|---|---|---|---|
| held-back documentation topics | {docs:.4f} | {math.exp(docs):.3f} | {math.exp(exact_docs):.3f} |
| standard library's source, a fixed sample | {code:.4f} | {math.exp(code):.3f} | {math.exp(exact_code):.3f} |

A uniform guess has a perplexity of 256. Measured in windows of {CONTEXT} bytes that start without context.
"""


def publish(complete: Path, out: Path, *, overwrite: bool) -> None:
    """Rename the `complete` folder to `out`; a folder that is there is put aside first and deleted last.

    Raises FileExistsError if there is one and `overwrite` is false.
    """
    if not out.exists():
        os.rename(complete, out)
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists. Pass another --out, or --overwrite to replace it.")
    aside = complete.with_name(complete.name + "-old")
    os.rename(out, aside)
    try:
        os.rename(complete, out)
    except OSError:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside)


def train_base(out: Path, *, steps: int = STEPS, seed: int = 0, overwrite: bool = False) -> None:
    """Train a base from nothing and write its folder to `out`.

    Raises FileExistsError, before any work, if `out` exists and `overwrite` is false.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; train for at least 1 step.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Pass another --out, or --overwrite to replace it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system; made first, so that an unwritable place is known at once.
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        torch.manual_seed(seed)
        model = untrained_model()
        print(f"{model.num_parameters():,} parameters, {steps} steps, losses in nats per byte", flush=True)
        rows = train(model, steps, seed)
        save_model(model, beside)
        write_log(rows, beside / "train_log.csv")
        (beside / "README.md").write_text(model_card(model, beside, rows, seed, steps), encoding="utf-8")
        # mkdtemp and safetensors write for the owner alone; a package is read by others.
        beside.chmod(0o755)
        for file in beside.iterdir():
            file.chmod(0o644)
        publish(beside, out, overwrite=overwrite)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"Written to {out}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python tools/train_base.py",
        description="Train the embedded base model from nothing on Python's documentation topics.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of {BATCH} x {CONTEXT} bytes")
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights, the order of data and dropout")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        train_base(options.out, steps=options.steps, seed=options.seed, overwrite=options.overwrite)
    except (OSError, ValueError) as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")


if __name__ == "__main__":
    main()
