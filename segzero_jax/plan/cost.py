"""The cost of a compiled XLA program on one chip: FLOPs, bytes of main memory, bytes over the links.

XLA's own ``cost_analysis`` counts the body of a loop once. This module walks the text of the optimized program and
counts every body as often as its loop runs. Only matrix products count as FLOPs (on TPU they are convolutions), one
multiplication and one addition each. Memory traffic is what each instruction reads and writes outside on-chip memory;
a fusion that uses a slice of an array reads only that slice.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

from segzero_jax.plan.groups import first_group
from segzero_jax.plan.hlo import HloError, Instruction, read_computations

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The start of the name of a computation that is a reduce-scatter, as XLA writes it for TPU.
_REDUCE_SCATTER = "all-reduce-scatter"
# Instructions that move no data by themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "optimization-barrier", "add-dependency"),
}


# Identifies a collective: its channel, and the shapes and bytes of its results, wherever in memory they are.
_Key = tuple[str | None, tuple[tuple[tuple[int, ...], float], ...]]


# What the sizes of collectives are told by: their kind, or the chips that take part.
_By = TypeVar("_By")


class Kernel(NamedTuple):
    """A Pallas kernel's calls: their ``jax.named_scope``, their number, and the shapes of the array operands."""

    name: str
    scope: str
    calls: float
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Cost:
    """One chip's share of a program.

    Attributes:
      flops: FLOPs of matrix products, except in kernels.
      bytes: bytes read and written in main memory.
      collectives: bytes that the chip sends, by kind of collective.
      sent: the same bytes, by the chips that it exchanges them with (``first_group``).
      waiting: the part of ``sent`` in collectives that the program does nothing beside.
      kernels: Pallas calls, whose cost the walk cannot count.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)
    sent: dict[tuple[int, ...], float] = field(default_factory=dict)
    waiting: dict[tuple[int, ...], float] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)

    def add(self, other: "Cost", times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        _add_sizes(self.collectives, other.collectives, times)
        _add_sizes(self.sent, other.sent, times)
        _add_sizes(self.waiting, other.waiting, times)
        self.kernels += [kernel._replace(calls=times * kernel.calls) for kernel in other.kernels]


class Program:
    """The text of an optimized program (``compiled.as_text()``), parsed."""

    def __init__(self, text: str) -> None:
        """Raises HloError if the text is not a program."""
        self.computations, self.entry = read_computations(text)

    @cached_property
    def cost(self) -> Cost:
        """The cost of the whole program, every loop counted as often as it runs."""
        return self._of(self.entry)

    def split(self, scope: str) -> tuple[Cost, Cost, int]:
        """Separates the loops whose bodies are a ``jax.named_scope``, each continuing where the previous one ends.

        Returns:
          The cost of the program around them, the average cost of an iteration, and the number of iterations.

        Raises:
          HloError: there is no such loop at the top level of the program.
        """
        loops = [
            loop
            for loop in self.computations[self.entry].values()
            if loop.opcode == "while" and self._is_of(loop.named("body"), f"/{scope}/")
        ]
        if not loops:
            raise HloError(f"expected a loop over {scope} in the program")
        loops.sort(key=self.trip_count)
        ends = [self.trip_count(loop) for loop in loops]
        turn = Cost()
        for loop, begin, end in zip(loops, [0, *ends], ends, strict=False):
            turn.add(self._of(loop.named("body")), (end - begin) / ends[-1])
        return self._of(self.entry, without=loops), turn, ends[-1]

    def _is_of(self, name: str, scope: str) -> bool:
        """Whether most of a computation is in a scope: what two loops have in common may have the name of either."""
        names = [n for i in self.computations[name].values() if (n := i.attribute(r'op_name="([^"]*)"'))]
        return sum(scope in n for n in names) > len(names) / 2

    def collectives(self) -> Iterator[tuple[str, Instruction]]:
        """Every collective in the program, with its kind, once."""
        seen: set[_Key] = set()
        for name, body in self.computations.items():
            for instruction in body.values():
                kind = _kind(instruction, name)
                # A collective that overlaps with other work is repeated in each computation it overlaps with.
                key = _key(instruction)
                if kind and key not in seen:
                    seen.add(key)
                    yield kind, instruction

    def _of(self, name: str, without: Sequence[Instruction] = ()) -> Cost:
        cost = Cost()
        for _, part, times in self.parts(name, without):
            cost.add(part, times)
        return cost

    def parts(self, name: str, without: Sequence[Instruction] = ()) -> Iterator[tuple[Instruction, Cost, int]]:
        """The instructions of a computation and of those it calls, each with its cost per run and number of runs."""
        beside: set[_Key] = set()
        for instruction in self.computations[name].values():
            if instruction in without:
                continue
            if instruction.opcode == "while":
                turns = self.trip_count(instruction)
                for part, cost, times in self.parts(instruction.named("body")):
                    yield part, cost, turns * times
            elif instruction.opcode in ("call", "async-start"):
                for called in instruction.called():
                    for part, cost, times in self.parts(called):
                        if instruction.opcode == "async-start":
                            cost.waiting.clear()
                        yield part, cost, times
            elif instruction.opcode == "conditional":
                raise HloError(f"{name}: {instruction.name} is a conditional, whose branches cannot be counted")
            else:
                cost = Cost()
                self._add(instruction, name, cost, beside)
                yield instruction, cost, 1

    def _add(self, instruction: Instruction, name: str, cost: Cost, beside: set[_Key]) -> None:
        body = self.computations[name]
        if instruction.opcode == "fusion":
            (called,) = instruction.called()
            for inner in self._inside(called):
                cost.flops += self._flops(*inner)
                holder, part = inner
                kind = _kind(part, holder)
                key = _key(part)
                if kind and key not in beside:
                    beside.add(key)
                    # Other fusions with a collective start it, or join it with a product.
                    _send(cost, kind, part, waits=holder.startswith(_REDUCE_SCATTER))
            cost.bytes += self._fusion_bytes(instruction, called, body)
            return
        cost.flops += self._flops(name, instruction)
        kind = _kind(instruction, name)
        if kind:
            _send(cost, kind, instruction, waits=not instruction.opcode.endswith("-start"))
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            shapes = tuple(array.shape for operand in instruction.operands for array in body[operand].arrays)
            scope = instruction.attribute(r'op_name="([^"]*)"') or ""
            cost.kernels.append(Kernel(instruction.name, scope, 1, shapes))
        cost.bytes += _bytes(instruction, body)

    def _inside(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """All instructions of a fused computation and of those fused into it."""
        for instruction in self.computations[name].values():
            if instruction.opcode == "fusion":
                for called in instruction.called():
                    yield from self._inside(called)
            else:
                yield name, instruction

    def _root(self, name: str) -> Instruction:
        """The root instruction of a computation."""
        (root,) = (part for part in self.computations[name].values() if part.is_root)
        return root

    def trip_count(self, loop: Instruction) -> int:
        """The number of iterations of a loop whose counter goes from 0 up to a constant bound in constant steps.

        Raises:
          HloError: the loop is not of this form.
        """
        condition, body = loop.named("condition"), loop.named("body")
        found = [
            (limit, index)
            for place, part in self._inside(condition)
            if part.opcode == "compare" and "direction=LT" in part.attributes
            for index, limit in self._bounded(condition, place, part)
        ]
        if len(found) != 1:
            raise HloError(f"{condition}: expected a loop that counts up to a constant")
        limit, index = found[0]
        return -(-limit // self._increment(body, self._root(body).operands[index], index))

    def _bounded(self, condition: str, place: str, compare: Instruction) -> Iterator[tuple[int, int]]:
        """Index in the loop's tuple, and bound, of a counter that a comparison keeps below a constant."""
        left, right = (self.computations[place][operand] for operand in compare.operands)
        if place != condition:
            # Inside a fusion: its parameters are the fusion's operands in the condition.
            (fusion,) = (part for part in self.computations[condition].values() if place in part.called())
            outer = [self.computations[condition][operand] for operand in fusion.operands]
            given = lambda part: outer[part.number()] if part.opcode == "parameter" else part  # noqa: E731
            left, right = given(left), given(right)
        if left.opcode == "get-tuple-element" and right.opcode == "constant":
            yield int(left.attribute(r"index=(\d+)") or 0), right.number()

    def _increment(self, name: str, operand: str, index: int, caller: tuple[str, Instruction] | None = None) -> int:
        """The constant that a loop's body adds to the counter at ``index`` of its tuple.

        Args:
          name, operand: a computation, and the value in it that becomes the counter.
          caller: if the computation is a fusion's: the computation with the fusion, and the fusion.
        """
        body = self.computations[name]
        part = body[operand]
        if part.opcode == "get-tuple-element" and part.attribute(r"index=(\d+)") == str(index):
            return 0
        if part.opcode == "parameter" and caller:
            outer, fusion = caller
            return self._increment(outer, fusion.operands[part.number()], index)
        if part.opcode == "constant":
            return part.number()
        if part.opcode in ("copy", "bitcast", "add"):
            return sum(self._increment(name, one, index, caller) for one in part.operands)
        if part.opcode == "fusion":
            (called,) = part.called()
            return self._increment(called, self._root(called).name, index, (name, part))
        raise HloError(f"{name}: expected a counter that goes up by a constant, found {part.opcode} {part.name}")

    def _flops(self, name: str, instruction: Instruction) -> float:
        if instruction.opcode not in ("dot", "convolution"):
            return 0.0
        body = self.computations[name]
        left, right = (body[operand].arrays[0].shape for operand in instruction.operands[:2])
        (out,) = instruction.arrays
        if instruction.opcode == "dot":
            contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
            return 2.0 * math.prod(out.shape) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return _convolution_flops(left, right, out.shape, instruction)

    def _fusion_bytes(self, fusion: Instruction, called: str, body: dict[str, Instruction]) -> float:
        inner = self.computations[called]
        parameters = {part.number(): part for part in inner.values() if part.opcode == "parameter"}
        total = 0.0
        for index, operand in enumerate(fusion.operands):
            if body[operand].traffic:
                total += min(body[operand].traffic, self._read(called, parameters[index].name))
        return total + min(fusion.traffic, self._written(called, self._root(called), fusion.traffic))

    def _read(self, name: str, parameter: str) -> float:
        """Bytes of a fused computation's parameter that are read: all, or the slices taken from it."""
        body = self.computations[name]
        total = 0.0
        for user in body.values():
            if parameter not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
                continue
            elif user.opcode in ("bitcast", "convert"):
                narrower = body[parameter].arrays[0].bytes / max(user.arrays[0].bytes, 1)
                total += narrower * self._read(name, user.name)
            elif user.opcode == "fusion":
                (called,) = user.called()
                inner = [part for part in self.computations[called].values() if part.opcode == "parameter"]
                for part in inner:
                    if user.operands[part.number()] == parameter:
                        total += self._read(called, part.name)
            else:
                return math.inf
        return total

    def _written(self, name: str, root: Instruction, whole: float) -> float:
        """Bytes that a fused computation writes: its results, or the slices that it updates in an array."""
        body = self.computations[name]
        if root.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in body[root.operands[1]].arrays)
        if root.opcode == "bitcast" and root.operands[0] in body:
            return self._written(name, body[root.operands[0]], whole)
        if root.opcode == "fusion":
            (called,) = root.called()
            return self._written(called, self._root(called), whole)
        if root.opcode == "tuple":
            parts = [body[operand] for operand in root.operands]
            return sum(self._written(name, part, sum(array.bytes for array in part.arrays)) for part in parts)
        return whole


def _add_sizes(total: dict[_By, float], sizes: Mapping[_By, float], times: float = 1) -> None:
    for name, size in sizes.items():
        total[name] = total.get(name, 0.0) + times * size


def _kind(instruction: Instruction, computation: str) -> str | None:
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in _COLLECTIVES:
        return None
    return "reduce-scatter" if computation.startswith(_REDUCE_SCATTER) else opcode


def _key(collective: Instruction) -> _Key:
    arrays = tuple((array.shape, array.bytes) for array in collective.arrays)
    return collective.attribute(r"channel_id=(\d+)"), arrays


def _send(cost: Cost, kind: str, instruction: Instruction, waits: bool) -> None:
    size = max((array.bytes for array in instruction.arrays), default=0.0)
    if kind in ("all-reduce", "reduce-scatter", "all-to-all"):
        size = sum(array.bytes for array in instruction.arrays)
    group = first_group(instruction)
    n = len(group)
    if kind == "collective-permute":
        sent = size
    elif kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
        sent = size * (n - 1)
    else:
        sent = size * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    _add_sizes(cost.collectives, {kind: sent})
    _add_sizes(cost.sent, {group: sent})
    if waits:
        _add_sizes(cost.waiting, {group: sent})


def _bytes(instruction: Instruction, body: dict[str, Instruction]) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return 0.0
    if opcode in ("dynamic-slice", "slice", "gather"):
        return instruction.traffic + min(instruction.traffic, sum(body[o].traffic for o in instruction.operands[:1]))
    if opcode == "dynamic-update-slice":
        return 2 * min(instruction.traffic, body[instruction.operands[1]].arrays[0].bytes)
    if opcode.endswith("-start"):
        # Besides its output, the result lists the operands again: after it for a copy, before it otherwise.
        made = instruction.arrays[0 if opcode == "copy-start" else len(instruction.operands)]
        reads = any(body[operand].traffic for operand in instruction.operands)
        return made.traffic + (made.bytes if reads else 0.0)
    return instruction.traffic + sum(body[operand].traffic for operand in instruction.operands)


def _convolution_flops(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], instruction: Instruction
) -> float:
    """FLOPs without multiplications by padding or by the zeros of a dilation, which are not made."""
    labels = instruction.attribute(r"dim_labels=([\w\->]+)")
    assert labels
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    options = dict(item.split("=") for item in window.split())
    count = sum(label.isdigit() for label in left_labels)
    per_axis = lambda key, default: options[key].split("x") if key in options else [default] * count  # noqa: E731
    sizes, strides = per_axis("size", "1"), per_axis("stride", "1")
    pads, left_dilations = per_axis("pad", "0_0"), per_axis("lhs_dilate", "1")
    right_dilations = per_axis("rhs_dilate", "1")
    products = 1.0
    for axis in range(count):
        label = str(axis)
        length = left[left_labels.index(label)]
        results = out[out_labels.index(label)]
        size, stride, low = int(sizes[axis]), int(strides[axis]), int(pads[axis].split("_")[0])
        spread, step = int(left_dilations[axis]), int(right_dilations[axis])
        reach = (length - 1) * spread + 1
        products *= sum(
            0 <= place < reach and place % spread == 0
            for k in range(size)
            for place in range(k * step - low, k * step - low + results * stride, stride)
        )
    features = right[right_labels.index("i")]
    return 2.0 * products * features * left[left_labels.index("b")] * out[out_labels.index("f")]
