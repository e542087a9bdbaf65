"""TPU slices by name: the peaks of a chip, and a mesh over chips that are not there."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from segzero_jax.mesh import MeshError, answer_libtpu, arrange, parse_mesh


class PlanError(ValueError):
    """A plan that cannot be made; one line."""


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (docs.cloud.google.com/tpu/docs: v5e, v5p, v6e).

    Attributes:
      hbm_gib: memory that the compiler lets a program use.
      flops_per_s: bfloat16 FLOPs.
      hbm_bytes_per_s: bytes to and from its memory.
      link_bytes_per_s: bytes one way over one of the chip's links. Each mesh axis is assumed to have one link each
        way, as at the end of a row; a closed ring has two.
    """

    hbm_gib: float
    flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(15.75, 197e12, 819e9, 400e9 / 8),
    "v5p": Chip(95.74, 459e12, 2765e9, 1200e9 / 12),
    "v6e": Chip(31.25, 918e12, 1638e9, 800e9 / 8),
}


_SIZE = re.compile("[1-9][0-9]*")


def read_topology(text: str) -> tuple[Chip, str, tuple[int, ...]]:
    """``"v5e:4x4"`` -> the chip, its generation, and the slice's shape. Raises PlanError."""
    generation, _, shape = text.partition(":")
    sizes = shape.split("x")
    flat = 2 if generation in ("v5e", "v6e") else 3
    if generation not in CHIPS or len(sizes) != flat or not all(_SIZE.fullmatch(size) for size in sizes):
        raise PlanError(f"--topology={text}: expected v5e:4x4, v6e:4x4 or v5p:2x2x4, or one of other sizes")
    found = tuple(map(int, sizes))
    if any(size > 1 and size % 2 for size in found[:2]):
        raise PlanError(f"--topology={text}: a host has 2x2 chips, so the first two sides are expected to be 1 or even")
    return CHIPS[generation], generation, found


def make_topology_mesh(mesh: str, topology: str) -> jax.sharding.Mesh:
    """The mesh over the chips of a slice that is not there.

    Raises:
      PlanError: there is no such slice, or libtpu is not installed.
      MeshError: the mesh has another number of chips.
    """
    _, _, shape = read_topology(topology)
    sizes = parse_mesh(mesh)
    if math.prod(sizes) != math.prod(shape):
        raise MeshError(
            f"--mesh={mesh}: {math.prod(sizes)} chips, --topology={topology} has {math.prod(shape)}; make them equal"
        )
    answer_libtpu()
    # The compiler uses no chip: it may run beside another process that has libtpu loaded.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A host has 2 x 2 chips or fewer.
    host = (*(min(2, size) for size in shape[:2]), 1)
    try:
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host, num_slices=1
        )
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if importlib.util.find_spec("libtpu") is None:
            raise PlanError(f"--topology={topology}: needs the TPU compiler: pip install 'jax[tpu]'") from None
        raise PlanError(f"--topology={topology}: no such slice: {reason}") from None
    return arrange(mesh, slice_.devices)
