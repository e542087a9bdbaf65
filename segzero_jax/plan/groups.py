"""Finds the chips in a collective, and the mesh axes along which they differ."""

import re
from collections.abc import Sequence

import numpy as np

from segzero_jax.plan.hlo import HloError, Instruction


def first_group(instruction: Instruction) -> tuple[int, ...]:
    """The chips of a collective's first group, by their index in the mesh; all groups have the same structure.

    For a permutation, it is the first pair of chips that sends something.

    XLA writes groups as lists, as pieces of an array of all chips, and as named axes of a mesh of its own.

    Raises:
      HloError: the groups are written in another way.
    """
    text = instruction.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]+\})\}", text):
        # Some chips may send to themselves.
        found = re.findall(r"(\d+),(\d+)", pairs[1])
        return next(((int(a), int(b)) for a, b in found if a != b), (int(found[0][0]),))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(_chips(tiled[2], tiled[3]).reshape(-1, int(tiled[1]))[0].tolist())
    # A part of an axis, 'a':(1)2, is not supported.
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chips = _chips(mesh[2] or ",".join(map(str, sizes.values())), mesh[3]).reshape(*sizes.values())
        joined = re.findall(r"'(\w+)'", mesh[4])
        return tuple(chips[tuple(slice(None) if name in joined else 0 for name in sizes)].ravel().tolist())
    raise HloError(f"{instruction.name}: expected groups of chips in {text[:120]}")


def crossed_axes(group: Sequence[int], mesh: Sequence[int]) -> list[int]:
    """Axes of a mesh of these sizes along which the chips of a group differ."""
    places = np.stack(np.unravel_index(group, mesh))
    return [axis for axis, place in enumerate(places) if len(set(place.tolist())) > 1]


def _chips(sizes: str, order: str | None) -> np.ndarray:
    """All chips in XLA's array notation: numbered in this shape, then transposed, flat."""
    shape = tuple(map(int, sizes.split(",")))
    axes = tuple(map(int, order.split(","))) if order else range(len(shape))
    return np.arange(np.prod(shape)).reshape(shape).transpose(*axes).ravel()
