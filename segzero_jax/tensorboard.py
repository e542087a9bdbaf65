"""Scalars for TensorBoard, written straight in its file format.

The public writers do not fit: importing tensorboardX imports torch if torch is installed, which the trainer must not
do, and the tensorboard package brings a web server. The format is small: records framed as in TFRecord
(tensorflow/core/lib/io/record_writer.h), each holding an ``Event`` message (tensorflow/core/util/event.proto).
"""

import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected
_MASK = 0xA282EAD8  # added to a rotated checksum, record_writer.h
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # protobuf wire types


class EventFile:
    """An event file in ``directory``; there may be several, which TensorBoard reads in order of their names.

    Args:
      directory: where the file is; created if missing.
      first_step: if given, TensorBoard discards what earlier files hold for this step and later ones.
    """

    def __init__(self, directory: Path, first_step: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = _create(directory)
        self._write(_field(3, _BYTES, b"brain.Event:2"))
        if first_step is not None:
            start = _field(1, _VARINT, _varint(1))  # SessionLog.status = START
            self._write(_field(2, _VARINT, _varint(first_step)) + _field(7, _BYTES, start))

    def write(self, step: int, scalars: Mapping[str, float], wall_s: float | None = None) -> None:
        """Adds scalars by tag, at ``wall_s`` since the epoch or now; they are in the file when this returns."""
        values = b"".join(
            _field(1, _BYTES, _field(1, _BYTES, tag.encode()) + _field(2, _FLOAT, struct.pack("<f", value)))
            for tag, value in scalars.items()
        )
        self._write(_field(2, _VARINT, _varint(step)) + _field(5, _BYTES, values), wall_s)

    def close(self) -> None:
        """Closes the file. An event that could not be written, as ``write`` has reported, is dropped."""
        with suppress(OSError):
            self._file.close()

    def _write(self, event: bytes, wall_s: float | None = None) -> None:
        record = _field(1, _DOUBLE, struct.pack("<d", time.time() if wall_s is None else wall_s)) + event
        length = struct.pack("<Q", len(record))
        self._file.write(length + _checksum(length) + record + _checksum(record))
        self._file.flush()


def _create(directory: Path) -> BinaryIO:
    for attempt in range(1000):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{attempt:03d}"
        try:
            return (directory / name).open("xb")
        except FileExistsError:
            continue
    raise FileExistsError(f"{directory}: a thousand event files of the same second; expected a few")


def _field(number: int, wire_type: int, payload: bytes) -> bytes:
    length = _varint(len(payload)) if wire_type == _BYTES else b""
    return _varint(number << 3 | wire_type) + length + payload


def _varint(value: int) -> bytes:
    if value < 0:
        raise ValueError(f"step {value}: expected 0 or more")
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _table()
