"""Texts and images with one label each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import ConfigError, DataError, listed
from lightning_lora.recipes.data.base import PadRows, SourceData
from lightning_lora.recipes.data.source import Source, Splits, require_columns
from lightning_lora.recipes.models import ModelSource

if TYPE_CHECKING:
    from PIL.Image import Image

TOO_MANY_LABELS = 1000


class LabelledData(SourceData):
    """Rows with one label each. The labels are text, whole numbers (1.0 is 1), booleans or `datasets.ClassLabel`.

    Unless given, `label_names` are the labels of the train split, sorted; a label of another split that is not among
    them is an error. When rows are held back from training, at least one row of each label stays in the training rows.
    Predicting needs no labels in the rows, but then `label_names` must be given.
    """

    def __init__(
        self, source: Source, label_column: str, label_names: Sequence[str] | None, batch_size: int, num_workers: int
    ) -> None:
        super().__init__(source, batch_size, num_workers)
        self.label_column = label_column
        self._given_names = None if label_names is None else [str(name_of(name)) for name in label_names]
        if self._given_names is not None and len(set(self._given_names)) < len(self._given_names):
            raise ConfigError(f"label_names has a name twice: {self._given_names}.")

    @cached_property
    def splits(self) -> Splits:
        return with_every_label_in_training(self.source.load(), self.label_column)

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the labels; a label's index is its place here."""
        if self._given_names is not None:
            return self._given_names
        return names_of_labels(self.splits.train, self.label_column)

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        assert self.num_labels  # read the labels now, so that an error in them is raised here

    def index_of_labels(self, rows: Any, split: str) -> list[int]:
        """The label of each row as an index into `label_names`. Raises DataError for a label that is not among them."""
        require_columns(rows, [self.label_column], split, "label_column")
        feature = rows.features[self.label_column]
        values = rows.with_format(None)[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            values = [feature.names[value] if value is not None and value >= 0 else None for value in values]
        index = {name: place for place, name in enumerate(self.label_names)}
        names = [name_of(value) for value in values]
        unknown = sorted({"(none)" if name is None else name for name in names if name not in index})
        if unknown:
            made = self.splits.made.get(split)
            held_back = f", held back from the training rows by {made}," if made else ""
            raise DataError(
                f"The {split} data{held_back} has labels that are not among label_names: {listed(unknown)}. "
                f"Known are {listed(self.label_names)}."
            )
        return [index[name] for name in names if name is not None]


class TextClassificationData(LabelledData):
    """Texts (or pairs of texts, with `pair_column`) with a label each, cut at `max_length` tokens (or at the
    model's own context, where that is less).

    Batches have `input_ids`, `attention_mask` (and `token_type_ids` where the model has them), (rows, tokens of the
    longest), and `labels` (rows,).
    """

    def __init__(
        self,
        tokenizer: ModelSource,
        source: Source,
        text_column: str = "text",
        label_column: str = "label",
        pair_column: str | None = None,
        label_names: Sequence[str] | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(source, label_column, label_names, batch_size, num_workers)
        if max_length < 1:
            raise ConfigError(f"max_length is {max_length}; it must be at least 1 token.")
        self.tokenizer = tokenizer.tokenizer()
        self.text_columns = [text_column] if pair_column is None else [text_column, pair_column]
        # RoBERTa's config has two positions more than a text may have tokens; its tokenizer has the right number.
        self.max_length = min(max_length, tokenizer.context() or max_length, self.tokenizer.model_max_length)
        self.collate = PadRows(self.tokenizer.pad_token_id or 0)

    def encode(self, rows: Any, split: str) -> Any:
        require_columns(rows, self.text_columns, split, "text_column")
        encoded = rows.map(
            tokenise_rows,
            batched=True,
            remove_columns=rows.column_names,
            fn_kwargs={"tokenizer": self.tokenizer, "columns": self.text_columns, "max_length": self.max_length},
            desc=f"Tokenising {split}",
        )
        return encoded if split == "predict" else encoded.add_column("labels", self.index_of_labels(rows, split))


class ImageClassificationData(LabelledData):
    """Images with a label each, resized and normalised by the model's image processor when they are read.

    Batches have `pixel_values` (rows, channels, height, width) and `labels` (rows,). The source may be a folder with
    one folder of images per label: DataSource(path=that folder). It may also be a table (CSV, JSON) that names image
    files in `image_column`, relative to the table's folder or to the current one. `background` is the colour behind
    images that are transparent.
    """

    def __init__(
        self,
        processor: ModelSource,
        source: Source,
        image_column: str = "image",
        label_column: str = "label",
        label_names: Sequence[str] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        background: str = "white",
    ) -> None:
        super().__init__(source, label_column, label_names, batch_size, num_workers)
        from PIL import ImageColor  # here, since training on texts needs no Pillow

        try:
            ImageColor.getrgb(background)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"background is a colour, such as white or #808080, not {background!r}.") from error
        self.processor = processor.image_processor()
        self.image_column = image_column
        self.background = background
        self.collate = default_collate

    def encode(self, rows: Any, split: str) -> Dataset:
        require_columns(rows, [self.image_column], split, "image_column")
        labels = None if split == "predict" else self.index_of_labels(rows, split)
        images = rows.select_columns([self.image_column])
        feature = images.features[self.image_column]
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
            images = self._named_files(images[self.image_column], split)
        elif not isinstance(feature, datasets.Image):
            raise DataError(f"Column {self.image_column!r} holds no images and no names of files, but {feature}.")
        return Images(images, self.image_column, self.processor, labels, self.background)

    def _named_files(self, names: Sequence[Any], split: str) -> datasets.Dataset:
        """The images in the files `names`. A missing file is an error now, not in the middle of training."""
        places = [getattr(self.source, f"{kind}path", None) for kind in _TABLES[split]]
        table = next((Path(place).expanduser() for place in places if place is not None), Path())
        folders = [table if table.is_dir() else table.parent, Path()]
        files: list[str] = []
        for row, name in enumerate(names):
            if not isinstance(name, str) or not name.strip():
                raise DataError(f"Row {row} of the {split} data names no image in {self.image_column!r}, but {name!r}.")
            found = (folder / Path(name.strip()).expanduser() for folder in folders)
            file = name if "://" in name else next((str(path.absolute()) for path in found if path.is_file()), None)
            if file is None:
                raise DataError(
                    f"Row {row} of the {split} data names the image {name!r}, and there is no such file, neither from "
                    f"{folders[0].absolute()} on nor from {Path.cwd()}."
                )
            files.append(file)
        features = datasets.Features({self.image_column: datasets.Image()})
        return datasets.Dataset.from_dict({self.image_column: files}, features=features)


_TABLES = {
    "train": ("",),
    "validation": ("validation_", ""),
    "test": ("test_", ""),
    "predict": ("test_", "validation_", ""),
}
"""Split -> prefixes of a DataSource's path settings, in order: the split is read from the first path that is set."""


class Images(Dataset):
    """Decodes and prepares an image when it is asked for, so that a large set need not fit into memory."""

    def __init__(
        self, rows: Any, column: str, processor: Any, labels: list[int] | None, background: str = "white"
    ) -> None:
        self.rows = rows
        self.column = column
        self.processor = processor
        self.labels = labels
        self.background = background

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from PIL.Image import DecompressionBombError

        try:
            image = self.rows[index][self.column]
            if image is None:
                raise DataError("there is none.")
            with image:
                image = in_rgb(image, self.background)
        except (OSError, ValueError, SyntaxError, DecompressionBombError, DataError) as error:  # raised by Pillow
            raise DataError(f"The image {self._name(index)} cannot be read: {error}") from error
        item = {"pixel_values": self.processor(image, return_tensors="pt")["pixel_values"][0]}
        return item if self.labels is None else {**item, "labels": torch.tensor(self.labels[index])}

    def _name(self, index: int) -> str:
        row = self.rows.cast_column(self.column, datasets.Image(decode=False))[index][self.column]
        return (row or {}).get("path") or f"in row {index}"


def in_rgb(image: Image, background: str = "white") -> Image:
    """`image` in 8 bits for each of red, green and blue, as a viewer shows it. Raises DataError if the range of its
    values is not known, or if nothing of a transparent image could be seen on `background`."""
    import PIL.Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        most = 1.0 if image.mode == "F" else 65535.0
        # In PNG and PPM files, mode "I" holds 16-bit values. In other formats it holds 32 bits, whose range is unknown.
        is_known = image.mode != "I" or image.format in ("PNG", "PPM")
        if not (is_known and values.min() >= 0 and values.max() <= most):
            raise DataError(
                f"its values are from {values.min():g} to {values.max():g}, in 32 bits, and which of them is white is "
                "not known. Save it in 8 or 16 bits, or with values from 0.0 to 1.0."
            )
        return PIL.Image.fromarray(np.rint(values / most * 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    shown = PIL.Image.new("RGBA", image.size, background)
    shown.alpha_composite(image)
    lowest, highest = zip(*shown.convert("RGB").getextrema(), strict=True)
    alpha = image.getchannel("A").getextrema()
    if lowest == highest and alpha[0] != alpha[1]:
        raise DataError(f"what is drawn on its transparent ground cannot be told from {background}: set background=.")
    return shown.convert("RGB")


def names_of_labels(rows: Any, column: str) -> list[str]:
    """The names of the labels in `column`: those of a ClassLabel in its order, else the distinct values, sorted."""
    require_columns(rows, [column], "train", "label_column")
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = set(rows.unique(column)) if isinstance(feature, datasets.Value) else {None}
    if not values or any(name_of(value) is None for value in values):
        found = f"{feature}" if None not in values or len(values) == 1 else "rows without a label"
        raise DataError(f"Column {column!r} must hold one label per row (text or whole numbers), but has {found}.")
    if len(values) > TOO_MANY_LABELS:
        raise DataError(f"Column {column!r} has {len(values)} different values: that is no column of labels.")
    return [str(name_of(value)) for value in sorted(values)]  # type: ignore[type-var]


def name_of(label: Any) -> str | None:
    """The name of a label, the same for every file format; None if the value is no label."""
    if isinstance(label, float):
        return str(int(label)) if label.is_integer() else None
    return str(label) if isinstance(label, (str, int)) else None


def with_every_label_in_training(splits: Splits, column: str) -> Splits:
    """`splits`, with a row of each label that training lacks moved back from the split that was held back."""
    train, parts = splits.train, {}
    for name in splits.made:
        rows = getattr(splits, name)
        if not isinstance(rows.features.get(column), (datasets.Value, datasets.ClassLabel)):
            continue
        known = set(train.unique(column))
        first: dict[Any, int] = {}
        for place, label in enumerate(rows.with_format(None)[column]):
            if label is not None and label not in known:
                first.setdefault(label, place)
        if first and len(first) < len(rows):
            train = datasets.concatenate_datasets([train, rows.select(first.values())])
            parts[name] = rows.select(sorted(set(range(len(rows))) - set(first.values())))
    kept = splits._replace(train=train, **parts)
    kept.made = splits.made
    return kept


def tokenise_rows(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, columns: list[str], max_length: int
) -> dict[str, Any]:
    """Token ids of each text or pair of texts, with the model's special tokens."""
    for column in columns:
        for text in batch[column]:
            if not isinstance(text, str):
                raise DataError(f"Column {column!r} must hold text, but there is {text!r:.80}")
    return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length))
