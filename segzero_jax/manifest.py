"""A checkpoint's manifest: the size and SHA-256 of every file, so that damage is found before anything is restored.

Orbax and its stores checksum only parts of a checkpoint; a flipped bit in an array's file can come back as another
number. The manifest is one more item of the checkpoint: written when the others are complete, committed with them.
"""

import dataclasses
import errno
import hashlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from segzero_jax.local_path import is_url

ITEM = "manifest"
_FILE = "manifest.json"
_THREADS = 4
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class ManifestHandler(ocp.CheckpointHandler):
    """Writes the manifest. Must be the last of a checkpoint's handlers: Orbax completes its items in that order."""

    def save(self, directory: epath.Path, args: "ManifestSave") -> None:
        """Does nothing yet: the other items are still being written."""

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        """Does nothing: ``damage`` reads it without Orbax, which might fail on the damage to be found."""

    def finalize(self, directory: epath.Path) -> None:
        """Describes the finished files of the other items. Runs on one host, in the background."""
        root = directory.parent
        items = [item for item in root.iterdir() if item.is_dir() and item.name != directory.name]
        paths = [path for item in items for path in _files(item)]
        with ThreadPoolExecutor(_THREADS) as pool:
            entries = dict(zip((_name(path, root) for path in paths), pool.map(_describe, paths), strict=True))
        content = json.dumps(entries, indent=0, sort_keys=True)
        (directory / _FILE).write_text(f"{content}\n{_sha256(content)}")


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """Requests the manifest of a checkpoint's other items."""


def damage(checkpoint: epath.Path, items: Collection[str]) -> str:
    """The damage to some items of a checkpoint, as one phrase; empty if they are as they were written.

    Args:
      checkpoint: the directory of a step.
      items: names of its items.

    Raises:
      OSError: a file exists and may be intact, but cannot be read now: no access, no connection.
    """
    file = checkpoint / ITEM / _FILE
    try:
        content, _, digest = file.read_bytes().decode(errors="replace").rpartition("\n")
    except OSError as error:
        return f"{ITEM}/{_FILE}: {_harm(error)}"
    if _sha256(content) != digest:
        return f"{ITEM}/{_FILE}: its content has changed"
    entries = json.loads(content)
    expected = {name: entry for name, entry in entries.items() if name.partition("/")[0] in items}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _difference(checkpoint / name, expected[name]), expected)
        for name, difference in zip(expected, found, strict=True):
            if difference:
                return f"{name}: {difference}"
    return ""


def _difference(path: epath.Path, expected: dict[str, Any]) -> str:
    try:
        length = path.stat().length
        if length != expected["bytes"]:
            return f"{length} bytes, expected {expected['bytes']}"
        # For files in a bucket, or copied from the bucket that they were saved to, only the length is known.
        found = expected["sha256"] and _digest(path)
        return "" if not found or found == expected["sha256"] else "its content has changed"
    except OSError as error:
        return _harm(error)


def _harm(error: OSError) -> str:
    """The permanent damage that an error reports. Raises errors that may pass, for a damaged checkpoint is deleted."""
    if isinstance(error, _GONE) or error.errno == errno.EIO:
        return error.strerror or type(error).__name__
    raise error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _name(path: epath.Path, root: epath.Path) -> str:
    return str(path.relative_to(root))


def _describe(path: epath.Path) -> dict[str, Any]:
    return {"bytes": path.stat().length, "sha256": _digest(path)}


def _digest(path: epath.Path) -> str:
    """SHA-256; empty in a bucket, which has its own checksums: reading files back would double a save's traffic."""
    if is_url(path):
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
