"""Networks of every kind, tiny and with random weights: from transformers' configs, and written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 32}


@dataclass(frozen=True)
class Kind:
    """One network, and an input for it."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    leave: tuple[str, ...] = ()
    """Modules that cannot be adapted, by name ending."""
    parameters: tuple[str, ...] = ()
    """target_parameters."""
    idle: str = ""
    """A regular expression for what takes no part in the loss."""
    peft: str = ""
    """Why PEFT is no oracle; empty where it is one."""
    config: dict[str, Any] = field(default_factory=dict)


def ids(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 30, (rows, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def encoded() -> dict[str, Tensor]:
    return {"input_ids": ids()["input_ids"], "labels": torch.tensor([0, 2])}


def floats(name: str, *shape: int, **more: Tensor) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(shape, generator=torch.Generator().manual_seed(2)), **more}


def of(config: str, model: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**fields))


def whisper_inputs() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2))
    return {"input_features": features, "labels": ids(2, 5)["input_ids"]}


class Residual(nn.Module):
    """As in torchvision's ResNet: convolutions, batch norms, a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class CrossAttention(nn.Module):
    """As in diffusers: queries from the picture, keys and values from the text."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(text, width, bias=False)
        self.to_v = nn.Linear(text, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:  # (N, H * W, width)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(text), self.to_v(text)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](y))


class UNet(nn.Module):
    """As diffusers' UNet2DConditionModel: down, middle with attention, up, with skips and a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.attention = CrossAttention(8, 6)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        skip = self.conv_in(x)
        h = F.silu(self.norm(self.down(skip) + self.time(time)[..., None, None]))
        h = h + self.attention(h.flatten(2).mT, text).mT.reshape(h.shape)
        h = self.up(self.depthwise(h))
        return self.conv_out(torch.cat([h, skip], 1))


def unet_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (2, 4, 8, 8), "time": (2, 8), "text": (2, 5, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Translator(nn.Module):
    """torch's own encoder and decoder, and an LSTM before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.rnn = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.body = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, _ = self.rnn(self.embed(input_ids))
        return self.head(self.body(x, self.embed(labels)))


_SHARED = r"(model\.)?shared\."  # transformers keeps it for its weight; the encoder's and the decoder's are called
_READ = "it misses layers that are read and never called"
ZOO = {
    "llama": Kind(of("LlamaConfig", "LlamaForCausalLM", **TEXT, num_key_value_heads=1), ids),
    "qwen3": Kind(of("Qwen3Config", "Qwen3ForCausalLM", **TEXT, num_key_value_heads=1, head_dim=8), ids),
    "gpt2": Kind(
        of("GPT2Config", "GPT2LMHeadModel", vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2), ids
    ),
    "bert": Kind(of("BertConfig", "BertForSequenceClassification", **TEXT, num_labels=3), encoded),
    "t5": Kind(
        of(
            "T5Config",
            "T5ForConditionalGeneration",
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        ids,
        idle=_SHARED,
    ),
    "bart": Kind(
        of(
            "BartConfig",
            "BartForConditionalGeneration",
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
            decoder_start_token_id=2,
        ),
        ids,
        leave=("embed_positions",),
        idle=_SHARED,
    ),
    "vit": Kind(
        of("ViTConfig", "ViTForImageClassification", **SIZES, image_size=16, patch_size=8, num_labels=3),
        floats("pixel_values", 2, 3, 16, 16, labels=torch.tensor([0, 2])),
    ),
    "convnext": Kind(
        of(
            "ConvNextConfig",
            "ConvNextForImageClassification",
            hidden_sizes=[8, 8],
            depths=[1, 1],
            num_stages=2,
            num_labels=3,
        ),
        floats("pixel_values", 2, 3, 32, 32, labels=torch.tensor([0, 2])),
        config={"rank": 8},
    ),
    "whisper": Kind(
        of(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            vocab_size=32,
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        whisper_inputs,
        leave=("embed_positions",),
        peft="it hides the stride of a convolution, which the model asks for",
    ),
    "wav2vec2": Kind(
        of(
            "Wav2Vec2Config",
            "Wav2Vec2ForSequenceClassification",
            **SIZES,
            vocab_size=32,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            num_labels=3,
            apply_spec_augment=False,
        ),
        floats("input_values", 2, 400, labels=torch.tensor([0, 2])),
        leave=("pos_conv_embed.conv",),
    ),
    "mamba": Kind(
        of("MambaConfig", "MambaForCausalLM", vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2),
        ids,
        leave=("conv1d",),
        peft=_READ,
    ),
    "mixtral": Kind(
        of(
            "MixtralConfig",
            "MixtralForCausalLM",
            **TEXT,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
        ),
        ids,
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "resnet": Kind(ResNet, floats("x", 4, 3, 16, 16)),
    "wavlm": Kind(
        of(
            "WavLMConfig",
            "WavLMForSequenceClassification",
            **SIZES,
            vocab_size=32,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            num_buckets=8,
            num_labels=3,
            apply_spec_augment=False,
        ),
        floats("input_values", 2, 400, labels=torch.tensor([0, 2])),
        leave=("pos_conv_embed.conv",),
        peft=_READ,
    ),
    "unet": Kind(UNet, unet_inputs, peft="it has no transposed convolutions", config={"rank": 4}),
    "translator": Kind(Translator, ids, peft=_READ),
}


def build(kind: Kind) -> nn.Module:
    """A fresh network, always with the same weights, in evaluation mode."""
    torch.manual_seed(1)
    return kind.model().eval()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    y: Any = model(**inputs)
    found: Tensor = y if isinstance(y, Tensor) else y.logits
    return found
