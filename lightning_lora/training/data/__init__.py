"""What is learned from: LightningDataModules over sources of rows (files, the Hub, or what every Python has)."""

from __future__ import annotations

from lightning_lora.training.data.base import SourceData
from lightning_lora.training.data.classification import ImageClassificationData, TextClassificationData
from lightning_lora.training.data.embedded import Shapes, StdlibDocstrings, StdlibSource, pirate_chats
from lightning_lora.training.data.instruction import InstructionData
from lightning_lora.training.data.source import DataSource, Source, Splits
from lightning_lora.training.data.text import TextData

__all__ = [
    "DataSource",
    "ImageClassificationData",
    "InstructionData",
    "Shapes",
    "Source",
    "SourceData",
    "Splits",
    "StdlibDocstrings",
    "StdlibSource",
    "TextClassificationData",
    "TextData",
    "pirate_chats",
]
