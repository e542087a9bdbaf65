"""Safetensors files of a checkpoint directory, mapped into memory: reading a tensor's part reads that part of the disk.

The format (github.com/huggingface/safetensors): a little-endian header length of 8 bytes, a JSON header, the tensors.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that does not hold the policy: names the file or tensor, what was found and what was expected."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file holds none."""
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def map_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory as views of its files, by the keys in the files.

    Where there is an index, the files it lists are read and no others.

    Raises:
      CheckpointError: no file, one that the index lists is not there, one is cut short or has an unknown dtype.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors file there")
    if (directory / _INDEX).is_file():
        weight_map = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / _INDEX}: expected a 'weight_map' from tensors to files")
        listed = set(weight_map.values())
        absent = sorted(listed - {file.name for file in files})
        if absent:
            raise CheckpointError(f"{directory}: {_INDEX} lists {absent[0]}, which is not there")
        files = [file for file in files if file.name in listed]
    views: dict[str, np.ndarray] = {}
    for file in files:
        for key, view in _map_file(file):
            if key in views:
                raise CheckpointError(f"{file}: {key} is in another file of {directory} too; expected it once")
            views[key] = view
    return views


def _map_file(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    size = file.stat().st_size
    if size < 8:
        raise CheckpointError(f"{file}: cut short: {size} bytes")
    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    if length > size - 8:
        raise CheckpointError(
            f"{file}: cut short, or no safetensors file: header of {length} bytes in a file of {size}"
        )
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        raise CheckpointError(f"{file}: not a safetensors file: its header is not JSON") from None
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: {key} has dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise CheckpointError(f"{file}: cut short: {key} ends at byte {8 + length + end} of {size}")
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{file}: {key} has {end - start} bytes; shape {shape} of {dtype} needs another number"
            )
        yield key, np.frombuffer(data, dtype, math.prod(shape), 8 + length + start).reshape(shape)


def write_tensors(tensors: dict[str, np.ndarray], directory: Path, max_file_bytes: int) -> list[Path]:
    """Writes ``model*.safetensors`` and, for more than one, their index; what an earlier writing left is deleted.

    Each file takes its place whole, in one step: a process that has the old one mapped keeps it.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size + tensor.nbytes > max_file_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    count = len(shards)
    names = (
        [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    for name, shard in zip(names, shards, strict=True):
        partial = directory / f"{name}.partial"
        save_file(shard, str(partial), metadata={"format": "pt"})
        os.replace(partial, directory / name)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        names.append(_INDEX)
        partial = directory / f"{_INDEX}.partial"
        partial.write_text(json.dumps(index, indent=1) + "\n")
        os.replace(partial, directory / _INDEX)
    for stale in {*directory.glob("model*.safetensors"), directory / _INDEX} - {directory / name for name in names}:
        stale.unlink(missing_ok=True)
    return [directory / name for name in names]
