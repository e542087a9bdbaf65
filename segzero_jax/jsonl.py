"""JSON lines as the run directory uses them: strict JSON, whole lines, files replaced in one step.

Text is written as ASCII with escapes, so no character of a sampled response can end a line early.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class JsonLinesError(ValueError):
    """A row that is not strict JSON, or a file with a line that is not; the message names file and line."""


def dump(row: Mapping[str, Any]) -> str:
    """A row as one line with its newline. Dataclasses become objects, numpy scalars and arrays numbers and lists.

    Raises:
      JsonLinesError: a number is not finite (JSON has no NaN), or a value has no JSON form.
    """
    try:
        return json.dumps(row, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise JsonLinesError(f"expected plain values and finite numbers, got {str(row)[:200]}: {error}") from None


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds one line; it is on the disk when this returns."""
    append_lines(path, [dump(row)])


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines made by ``dump``; they are on the disk when this returns."""
    with path.open("a", encoding="ascii") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file: a reader finds the old content or the new, never a part."""
    replace(path, "".join(dump(row) for row in rows).encode("ascii"))


def replace(path: Path, content: bytes, unfinished: str = ".tmp") -> None:
    """Puts ``content`` at ``path`` in one step, through a temporary file beside it.

    Args:
      unfinished: suffix of the temporary file's name; if several processes may write ``path``, each needs its own.
    """
    temporary = path.with_name(path.name + unfinished)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may still be written to: a last line without newline is not yet a row.

    Raises:
      JsonLinesError: a complete line is not a JSON object.
      OSError: the file cannot be read.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except ValueError as error:
            raise JsonLinesError(f"{path}:{number}: expected a JSON object on each line: {error}") from None
        if not isinstance(row, dict):
            raise JsonLinesError(f"{path}:{number}: expected a JSON object on each line, got {type(row).__name__}")
        rows.append(row)
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
