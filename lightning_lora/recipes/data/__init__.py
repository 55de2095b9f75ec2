"""Training data: LightningDataModules over sources of rows (files, the Hub, or data that every Python has)."""

from __future__ import annotations

from lightning_lora.recipes.data.base import SourceData
from lightning_lora.recipes.data.classification import ImageClassificationData, TextClassificationData
from lightning_lora.recipes.data.embedded import Shapes, StdlibDocstrings, StdlibSource, pirate_chats
from lightning_lora.recipes.data.instruction import InstructionData
from lightning_lora.recipes.data.source import DataSource, Source, Splits
from lightning_lora.recipes.data.text import TextData

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
