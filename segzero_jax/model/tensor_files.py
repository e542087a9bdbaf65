"""Safetensors files of a checkpoint directory: reads parts of tensors, writes file by file.

The format (github.com/huggingface/safetensors): a little-endian header length of 8 bytes, a JSON header, the tensors.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """The checkpoint does not hold the policy; names the file or tensor, the value found and the one expected."""


class StorageError(CheckpointError):
    """The checkpoint storage fails, perhaps temporarily: a full disk, an unreachable bucket or hub."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, whose data is not read yet.

    Attributes:
      key: its name in the file.
      stream: the open file, so that a file that replaces it later has no effect.
      offset: offset of the tensor's first byte in the file.
    """

    key: str
    file: Path
    stream: BinaryIO
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor, memory-mapped: only the parts used are read from disk. Its pages are freed with the view."""
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        count = math.prod(self.shape)
        length = self.offset - start + count * self.dtype.itemsize
        data = mmap.mmap(self.stream.fileno(), length, offset=start, access=mmap.ACCESS_READ)
        return np.frombuffer(data, self.dtype, count, self.offset - start).reshape(self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file does not hold one."""
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a directory by the keys in its files; only the files' headers are read.

    If there is an index, only the files it lists count. If there is also ``model.safetensors``, which transformers
    prefers, index and shards are ignored: they are left over from an earlier save.

    Raises:
      CheckpointError: there is no file, a file in the index is missing, or one is truncated or has an unknown dtype.
      StorageError: a file cannot be read now.
    """
    files = sorted(directory.glob("*.safetensors"))
    if (directory / _INDEX).is_file() and (directory / _WHOLE).is_file():
        files = [directory / _WHOLE]
    elif (directory / _INDEX).is_file():
        weight_map = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{directory / _INDEX}: expected a 'weight_map' from tensors to files")
        listed = set(weight_map.values())
        absent = sorted(listed - {file.name for file in files})
        if absent:
            raise CheckpointError(f"{directory}: {_INDEX} lists {absent[0]}, which is not there")
        files = [file for file in files if file.name in listed]
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file there")
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.key in found:
                raise CheckpointError(f"{file}: {tensor.key} is in another file of {directory} too; expected it once")
            found[tensor.key] = tensor
    return found


def _read_header(file: Path) -> Iterator[StoredTensor]:
    try:
        size, stream = file.stat().st_size, file.open("rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"{file}: {error.strerror}; expected a safetensors file") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read now: {error.strerror or error}") from None
    length = int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise CheckpointError(
            f"{file}: cut short, or no safetensors file: header of {length} bytes in a file of {size}"
        )
    try:
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = [
            (key, entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for key, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: not a safetensors file: its header is no list of tensors in JSON") from None
    for key, name, shape, start, end in entries:
        if name not in _DTYPES:
            raise CheckpointError(f"{file}: {key} has dtype {name}; expected one of {', '.join(_DTYPES)}")
        if 8 + length + end > size:
            raise CheckpointError(f"{file}: cut short: {key} ends at byte {8 + length + end} of {size}")
        dtype = _DTYPES[name]
        if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{file}: {key} has {end - start} bytes from {start}; shape {list(shape)} of {dtype} needs others"
            )
        yield StoredTensor(key, file, stream, dtype, shape, 8 + length + start)


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes one safetensors file with the process's default permissions: the library's files are owner-only."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # The library raises this for a full disk, too.
        path.unlink()
        raise OSError(f"{path}: cannot be written: {error}") from None
    path.chmod(mode)


def write_tensors(
    sizes: Mapping[str, int], tensors: Iterable[tuple[str, np.ndarray]], directory: Path, max_file_bytes: int
) -> list[Path]:
    """Writes ``model*.safetensors`` and, if there are several, their index; deletes files left by an earlier save.

    Tensors are taken one by one, and no more are held than go into one file. Files are renamed into place once all are
    written; a process that has the old ones open keeps reading those.

    Args:
      sizes: bytes of each tensor, in the order of ``tensors``; needed since the file names contain the number of files.
      tensors: pairs of key and values.
      max_file_bytes: the size at which a new file is begun.

    Returns:
      The files written.
    """
    shards: list[list[str]] = [[]]
    room = max_file_bytes
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_file_bytes
        shards[-1].append(key)
        room -= size
    count = len(shards)
    names = (
        [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    remaining = iter(tensors)
    try:
        for name, keys in zip(names, shards, strict=True):
            save_tensors(dict(islice(remaining, len(keys))), directory / f"{name}.partial")
        if count > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
            }
            names.append(_INDEX)
            (directory / f"{_INDEX}.partial").write_text(json.dumps(index, indent=1) + "\n")
        for name in names:
            os.replace(directory / f"{name}.partial", directory / name)
    finally:
        for name in names:
            (directory / f"{name}.partial").unlink(missing_ok=True)
    for stale in {*directory.glob("model*.safetensors"), directory / _INDEX} - {directory / name for name in names}:
        stale.unlink(missing_ok=True)
    return [directory / name for name in names]
