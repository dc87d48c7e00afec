"""The frames between engine and attention workers (spec section 11): a header of fixed size, then bytes.

Everything that comes in is untrusted until its header is checked: magic, version, type, number type and size
are looked at before a byte of the payload is read or memory for it is taken, the checksum over header and
payload before anyone sees it. Payloads are raw float32 tensors, row tables (`rows.py`) or small JSON; nothing
is ever unpickled.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flows.errors import TrunklineError

MAGIC = 0x4E494D4C  # "LMIN"
VERSION = 1
MAX_PAYLOAD = 256 << 20  # bytes; also bounds what one peer can make a worker allocate
MAX_JSON = 1 << 20
MAX_HELLO = 256

# magic, version, type, number type, unused, epoch, iteration, layer, micro-batch, rows, size, checksum
_HEADER = struct.Struct("<IBBBxIQHHIII")
HEADER_BYTES = _HEADER.size
_CHECKSUM_AT = HEADER_BYTES - 4


class FrameError(TrunklineError):
    """A peer sent bytes that are not a frame of this protocol; the connection cannot go on."""


class FrameType(IntEnum):
    HELLO = 1
    CONFIG = 2
    PLAN = 3
    Q = 4
    KV = 5
    OUT = 6
    PREFILL_KV = 7  # keys and values to be stored; nothing is computed
    ALLOC = 8
    FREE = 9
    ABORT = 10
    PING = 11
    STATS = 12
    ERROR = 13
    DRAIN = 14
    READ_KV = 15  # asks for stored keys and values of one request and layer


class NumberType(IntEnum):
    NONE = 0  # not a tensor
    FLOAT32 = 1


_RANGE = struct.Struct("<III")  # slot, first position, position after the last
_LIMITS = {FrameType.HELLO: MAX_HELLO} | dict.fromkeys(
    (FrameType.CONFIG, FrameType.PING, FrameType.STATS, FrameType.ERROR, FrameType.ABORT, FrameType.DRAIN),
    MAX_JSON,
)


class Header(NamedTuple):
    """What precedes every payload."""

    type: FrameType
    epoch: int = 0
    iteration: int = 0
    layer: int = 0
    micro_batch: int = 0
    number_type: NumberType = NumberType.NONE
    rows: int = 0
    payload_bytes: int = 0
    checksum: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Which plan the frame belongs to."""
        return self.iteration, self.micro_batch


class Frame(NamedTuple):
    """A header with its payload, checked."""

    header: Header
    payload: bytes | bytearray | memoryview = b""


def encode(header: Header, payload: bytes | bytearray | memoryview = b"") -> tuple[bytes, memoryview]:
    """Header bytes, with size and checksum filled in, and the payload as bytes."""
    body = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
    if len(body) > _LIMITS.get(header.type, MAX_PAYLOAD):
        raise FrameError(f"a {header.type.name} frame of {len(body)} bytes is too large to send")
    packed = _pack(header, len(body))
    checksum = zlib.crc32(body, zlib.crc32(packed[:_CHECKSUM_AT]))
    return packed[:_CHECKSUM_AT] + checksum.to_bytes(4, "little"), body


def decode_header(data: bytes | bytearray, limit: int = MAX_PAYLOAD) -> Header:
    """Read a header and judge all of it but the checksum, which needs the payload.

    Args:
        limit: bytes that the payload may have at most, whatever its type.

    Raises:
        FrameError: not a frame of this version, or too large.
    """
    if len(data) != HEADER_BYTES:
        raise FrameError(f"a frame header of {len(data)} bytes, expected {HEADER_BYTES}")
    magic, version, kind, number, epoch, iteration, layer, micro, rows, size, checksum = _HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError("the peer does not speak this protocol (wrong magic number)")
    if version != VERSION:
        raise FrameError(f"the peer speaks version {version} of the protocol, this is version {VERSION}")
    try:
        header = Header(
            FrameType(kind), epoch, iteration, layer, micro, NumberType(number), rows, size, checksum
        )
    except ValueError as error:
        raise FrameError(f"unknown frame: {error}") from None
    allowed = min(limit, _LIMITS.get(header.type, MAX_PAYLOAD))
    if size > allowed:
        raise FrameError(f"a {header.type.name} frame announces {size} bytes, at most {allowed} are taken")
    return header


def verify(header: Header, data: bytes | bytearray, payload: bytes | bytearray | memoryview) -> None:
    """
    Raises:
        FrameError: header bytes `data` and payload are not what was sent.
    """
    if zlib.crc32(payload, zlib.crc32(memoryview(data)[:_CHECKSUM_AT])) != header.checksum:
        raise FrameError(f"a {header.type.name} frame was damaged on its way (wrong checksum)")


def pack_tensors(*arrays: NDArray[np.float32]) -> bytes | memoryview:
    """float32 arrays one after another, little-endian."""
    parts = [np.ascontiguousarray(array, dtype="<f4") for array in arrays]
    if len(parts) == 1:
        return parts[0].reshape(-1).data.cast("B") if parts[0].size else b""
    return b"".join(part.tobytes() for part in parts)


def unpack_tensors(frame: Frame, *shapes: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """float32 arrays of these shapes, sharing memory with the payload.

    Raises:
        FrameError: another size or number type.
    """
    header = frame.header
    sizes = [math.prod(shape) for shape in shapes]
    if header.number_type is not NumberType.FLOAT32 or len(frame.payload) != 4 * sum(sizes):
        raise FrameError(
            f"a {header.type.name} frame of layer {header.layer} holds {len(frame.payload)} bytes of "
            f"{header.number_type.name}, expected {4 * sum(sizes)} of FLOAT32"
        )
    arrays, offset = [], 0
    for size, shape in zip(sizes, shapes, strict=True):
        arrays.append(np.frombuffer(frame.payload, "<f4", size, offset).reshape(shape))
        offset += 4 * size
    return arrays


def pack_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def unpack_json(frame: Frame) -> dict[str, Any]:
    """
    Raises:
        FrameError: not a JSON object.
    """
    try:
        value = json.loads(bytes(frame.payload))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a {frame.header.type.name} frame is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise FrameError(f"a {frame.header.type.name} frame is not a JSON object")
    return value


def pack_range(slot: int, start: int, end: int) -> bytes:
    """Positions of a request, for READ_KV."""
    return _RANGE.pack(slot, start, end)


def unpack_range(frame: Frame) -> tuple[int, int, int]:
    """
    Raises:
        FrameError: another size.
    """
    if len(frame.payload) != _RANGE.size:
        raise FrameError(f"a {frame.header.type.name} frame of {len(frame.payload)} bytes names no range")
    return _RANGE.unpack(frame.payload)


def _pack(header: Header, payload_bytes: int) -> bytes:
    kind, epoch, iteration, layer, micro_batch, number_type, rows, _, _ = header
    try:
        return _HEADER.pack(
            MAGIC, VERSION, kind, number_type, epoch, iteration, layer, micro_batch, rows, payload_bytes, 0
        )
    except struct.error as error:
        raise FrameError(f"{header} does not fit a frame: {error}") from None
