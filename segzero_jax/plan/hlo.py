"""The text of an optimized XLA program (``compiled.as_text()``), read into computations and instructions."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")


class HloError(ValueError):
    """A program text that this module does not understand; one line."""


class Array(NamedTuple):
    """One array of an instruction's result: bytes, shape, and whether it is in main memory."""

    bytes: float
    shape: tuple[int, ...]
    in_main_memory: bool

    @property
    def traffic(self) -> float:
        return self.bytes if self.in_main_memory else 0.0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self) -> list[str]:
        """Computations that this instruction runs as its own body."""
        return _CALLED.findall(self.attributes)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def number(self) -> int:
        """The value of an integer constant, or the index of a parameter. Raises HloError for anything else."""
        found = self.attribute(r"^(\d+)\)")
        if found is None:
            raise HloError(f"{self.name}: expected a whole number or a parameter, got {self.opcode}")
        return int(found)

    def named(self, key: str) -> str:
        """The computation that an attribute names. Raises HloError if there is no such attribute."""
        found = self.attribute(rf"\b{key}=%?([\w.\-]+)")
        if found is None:
            raise HloError(f"{self.name}: expected {key}= in {self.attributes[:80]}")
        return found

    @property
    def traffic(self) -> float:
        """Bytes of the result that are in main memory."""
        return sum(array.traffic for array in self.arrays)


def read_computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each a dict of its instructions by name, in order; and the name of the entry.

    Raises:
      HloError: the text has no entry, or a line cannot be read.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    # A kernel's metadata is JSON with line breaks in the middle of an instruction.
    for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            if header[1]:
                entry = header[2]
        elif current is not None and _INSTRUCTION.match(line):
            instruction = _parse(line)
            current[instruction.name] = instruction
    if not entry:
        raise HloError("no ENTRY computation: expected the text of a compiled program")
    return computations, entry


def _parse(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, arguments = rest.partition("(")
    close = _closing("(" + arguments, 0) - 1
    inside, after = arguments[:close], arguments[close + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    # A constant's value and a parameter's index are where operands would be.
    attributes = f"{inside}){after}" if opcode in ("constant", "parameter") else after
    return Instruction(match[2], opcode, _arrays(kind), operands, attributes, bool(match[1]))


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise HloError(f"unbalanced parentheses: {text[:80]}")


def _arrays(kind: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, sizes, layout in _ARRAY.findall(kind):
        if dtype in _BITS:
            shape = tuple(int(size) for size in sizes.split(",") if size)
            arrays.append(Array(math.prod(shape) * _BITS[dtype] / 8, shape, "S(" not in layout))
    return tuple(arrays)
