"""Files of tensors as safetensors itself writes and reads them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from lightning_lora.errors import AdapterFormatError
from lightning_lora.hub.mapped import DTYPES
from lightning_lora.hub.writing import laid_out

METADATA = {"format": "pt", "note": '{"quoted": "ä"}'}


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(laid_out(tensors, METADATA))


def parts(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_file_is_the_one_that_safetensors_writes(dtype: torch.dtype):
    some = torch.arange(24).to(torch.float32).to(dtype)
    tensors = {"b.ö": some.view(2, 3, 4), "a": some[:5].clone(), "one": some[7].clone(), "none": some[:0].clone()}
    ours, theirs = written(tensors), save(tensors, METADATA)
    assert parts(ours) == parts(theirs)
    assert len(ours) == len(theirs)


def test_tensors_of_several_widths_are_aligned_and_read_back():
    tensors = {f"{i}": torch.arange(i + 1).to(torch.float32).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    content = written(tensors)
    start = len(content) - len(parts(content)[1])
    header, _ = parts(content)
    for name, found in load(content).items():
        assert found.dtype == tensors[name].dtype
        assert found.view(torch.uint8).equal(tensors[name].view(torch.uint8))
        assert (start + header[name]["data_offsets"][0]) % found.dtype.itemsize == 0


def test_what_lies_in_another_order_or_shares_memory_is_written_as_it_reads():
    whole = torch.randn(4, 6)
    tensors = {
        "columns": whole.t(),
        "part": whole[1:3, ::2],
        "tied": whole,
        "again": whole,
        "grown": whole[0].expand(3, 6),
    }
    for name, found in load(written(tensors)).items():
        assert found.equal(tensors[name])


def test_nothing_is_copied():
    t = torch.zeros(3)
    pieces = laid_out({"t": t}, METADATA)
    t += 1
    assert load(b"".join(pieces))["t"].equal(torch.ones(3))


def test_numbers_that_have_no_place_in_a_file_are_named():
    with pytest.raises(AdapterFormatError, match=r"head\.weight holds torch\.complex128"):
        laid_out({"head.weight": torch.zeros(2, dtype=torch.complex128)}, METADATA)


def test_what_was_written_lies_in_memory_that_can_still_be_resized() -> None:
    t = torch.arange(6.0)
    assert b"".join(laid_out({"t": t}, METADATA)).endswith(t.numpy().copy().tobytes())
    fresh = torch.arange(6.0)
    laid_out({"t": fresh}, METADATA)
    fresh.untyped_storage().resize_(0)
