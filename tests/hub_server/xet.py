"""Uploads over Xet: the content-addressed store that hf_xet writes to, enough of it to get the files back.

A file comes as chunks, packed into xorbs, and a shard that says which chunks of which xorbs make which file. Downloads
are not offered over Xet: the server sends no Xet headers, and the client takes the plain path.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator

from tests.hub_server.exchange import Answer, RefusedError, Request
from tests.hub_server.server import HubServer

_HEADER = 48  # of the shard, and the size of each of its records
_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30


def token(hub: HubServer) -> Answer:
    """Where the store is, and leave to use it."""
    until = int(time.time()) + 3600
    headers = {
        "X-Xet-Cas-Url": hub.endpoint,
        "X-Xet-Access-Token": "xet_token",
        "X-Xet-Token-Expiration": str(until),
    }
    return Answer.json({"casUrl": hub.endpoint, "accessToken": "xet_token", "exp": until}, 200, **headers)


def put_xorb(hub: HubServer, request: Request, name: str) -> Answer:
    inserted = name not in hub.xorbs
    hub.xorbs[name] = list(chunks(request.body))
    return Answer.json({"was_inserted": inserted})


def put_shard(hub: HubServer, request: Request) -> Answer:
    for content in files(hub, request.body):
        hub.stored[hashlib.sha256(content).hexdigest()] = content
    return Answer.json({"result": 1})


def files(hub: HubServer, shard: bytes) -> Iterator[bytes]:
    """The contents of the files that a shard describes."""
    at = _HEADER
    while shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _HEADER
        content = bytearray()
        for _ in range(count):
            name = written(shard[at : at + 32])
            _, _, start, stop = struct.unpack_from("<IIII", shard, at + 32)
            if name not in hub.xorbs:
                raise RefusedError(400, f"There is no xorb {name}")
            content += b"".join(hub.xorbs[name][start:stop])
            at += _HEADER
        at += _HEADER * count * bool(flags & _VERIFIED) + _HEADER * bool(flags & _DESCRIBED)
        yield bytes(content)


def written(digest: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def chunks(xorb: bytes) -> Iterator[bytes]:
    """The chunks of a serialized xorb, which may end in a footer."""
    at = 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        kind = xorb[at + 4]
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        data = xorb[at + 8 : at + 8 + packed]
        at += 8 + packed
        if kind:
            data = lz4_frame(data)
        if kind == 2:
            data = _interleaved(data)
        if len(data) != size:
            raise RefusedError(400, "A chunk is not of the size that it says")
        yield data


def _interleaved(data: bytes) -> bytes:
    """Bytes that were grouped by their place in numbers of four bytes, in their own order again."""
    out = bytearray(len(data))
    at = 0
    for place in range(4):
        count = len(range(place, len(data), 4))
        out[place::4] = data[at : at + count]
        at += count
    return bytes(out)


def lz4_frame(data: bytes) -> bytes:
    """Decompress LZ4's frame format, without looking at its checksums."""
    flags = data[4]
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    out = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        block = data[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        at += 4 + len(block) + 4 * bool(flags & 16)
        if size >> 31:
            out += block
        else:
            _lz4_block(block, out)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    at = 0

    def length(start: int) -> int:
        nonlocal at
        total = start
        while start == 15:
            total += block[at]
            at += 1
            if block[at - 1] != 255:
                break
        return total

    while at < len(block):
        code = block[at]
        at += 1
        literals = length(code >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            break
        offset = int.from_bytes(block[at : at + 2], "little")
        at += 2
        count = length(code & 15) + 4
        for _ in range(count):
            out.append(out[-offset])
