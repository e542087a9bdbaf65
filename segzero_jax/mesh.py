"""Devices, the mesh, and the one table of shardings.

Model code names logical axes ("heads", "mlp", "batch"); only this file knows mesh axes. Three layouts of
one set of weights: TRAIN shards parameters FSDP x tensor and gathers a weight where it is used; ROLLOUT
keeps every weight where it is (heads over tensor; MLP and vocabulary over both axes) so that a
decode step moves activations only; FSDP is for training with a prompt for every device, with prompts
over all axes and the model's width over fsdp and tensor.

Mesh axes are ``Explicit``: an array's sharding is part of its type, and an operation whose result is
ambiguous asks for ``out_sharding``.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, PartitionSpec

AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")
_BOTH = ("fsdp", "tensor")


class MeshError(ValueError):
    """A mesh that does not fit the machine, the batch or the model; one line."""


@dataclass(frozen=True)
class Layout:
    """One phase's table: logical axis -> mesh axes (None: replicated).

    Attributes:
      batch: prompts, wherever activations are split by prompt.
      mlp_batch: prompts, inside the MLP.
      head_batch: prompts, in the output head.
      lookup_batch: prompts, while token embeddings are looked up.
      embed: rows of a weight matrix along the model width.
      heads: attention heads of queries, and of keys and values when there are enough of them.
      mlp, vocab: hidden units of the decoder's MLP; the vocabulary.
      vision_mlp: hidden units of the vision tower's MLP.
    """

    name: str
    batch: str | tuple[str, ...] | None
    mlp_batch: str | tuple[str, ...] | None
    head_batch: str | tuple[str, ...] | None
    lookup_batch: str | tuple[str, ...] | None
    embed: str | tuple[str, ...] | None
    heads: str | None
    mlp: str | tuple[str, ...] | None
    vocab: str | tuple[str, ...] | None
    vision_mlp: str | None

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions carry these logical axes.

        Where two of them name one mesh axis, the first has it.
        """
        taken: set[str] = set()
        parts: list[tuple[str, ...]] = []
        for axis in axes:
            parts.append(tuple(one for one in self.over(axis) if one not in taken) if axis else ())
            taken.update(parts[-1])
        return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))

    def over(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis is sharded over."""
        axes = getattr(self, axis)
        return (axes,) if isinstance(axes, str) else axes or ()


TRAIN = Layout(
    name="train",
    batch=_BATCH,
    mlp_batch=_BATCH,
    head_batch=_BATCH,
    lookup_batch="data",
    embed="fsdp",
    heads="tensor",
    mlp="tensor",
    vocab="tensor",
    vision_mlp="tensor",
)
# Gathering weights overlaps with products. In TRAIN, activations are summed over tensor after attention and MLP, which
# nothing can overlap with: the next product needs them. Embedding table and head stay as in TRAIN.
FSDP = replace(TRAIN, name="fsdp", batch=AXES, mlp_batch=AXES, embed=_BOTH, heads=None, mlp=None, vision_mlp=None)
ROLLOUT = Layout(
    name="rollout",
    batch=_BATCH,
    mlp_batch="data",
    head_batch="data",
    lookup_batch="data",
    embed=None,
    heads="tensor",
    mlp=_BOTH,
    vocab=_BOTH,
    vision_mlp="tensor",
)


def parse_mesh(text: str) -> tuple[int, int, int]:
    """``"4x4"`` (fsdp x tensor) or ``"2x4x4"`` (data x fsdp x tensor) -> (data, fsdp, tensor). Raises MeshError."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise MeshError(f"--mesh={text}: expected FSDPxTENSOR or DATAxFSDPxTENSOR, such as 4x4 or 2x4x4")
    data, fsdp, tensor = (1, *map(int, parts))[-3:]
    return data, fsdp, tensor


def prepare_cpu(mesh: str, hosts: int = 1) -> None:
    """Makes a CPU-only host provide its part of the mesh as virtual devices; no effect on TPU and GPU.

    Call it before JAX starts.

    Args:
      mesh: the whole mesh.
      hosts: processes that the mesh is spread over.

    Raises:
      MeshError: the text is not a mesh, or it does not divide among the processes.
    """
    count = math.prod(parse_mesh(mesh))
    if count % hosts:
        raise MeshError(f"--mesh={mesh}: {count} devices do not divide among {hosts} processes")
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # JAX sets it where it sees no TPU.
        answer_libtpu()
    # The CPU client can lock up behind a queue of dependent programs, so they run one at a time.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count // hosts)


def answer_libtpu() -> None:
    """Tells libtpu, on a machine without a TPU, what it would ask the machine; else it prints lines of errors."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def make_mesh(text: str) -> jax.sharding.Mesh:
    """Builds the mesh over the devices of this job; a single process on CPU may leave some of its own unused.

    Raises:
      MeshError: the text is not a mesh, the job has fewer devices or more, or its slices do not divide the data axis.
    """
    shape = parse_mesh(text)
    devices = jax.devices()
    needed = math.prod(shape)
    may_spare = devices[0].platform == "cpu" and jax.process_count() == 1
    if needed > len(devices) or (needed < len(devices) and not may_spare):
        kind = devices[0].device_kind
        raise MeshError(
            f"--mesh={text}: needs {needed} devices, this job has {len(devices)} ({kind}); choose factors of that"
        )
    return arrange(text, devices[:needed])


def arrange(text: str, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh over exactly these devices; with several slices, only the data axis crosses from one to another.

    Along data, only gradients are exchanged, once a step: little enough for the slow network between slices.

    Raises:
      MeshError: the slices do not divide the data axis.
    """
    data, fsdp, tensor = parse_mesh(text)
    axis_types = (AxisType.Explicit,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # A mesh axis may take a part of a physical one, and the next axis the rest.
        grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, AXES, axis_types=axis_types)
    if data % slices:
        each = len(devices) // slices
        raise MeshError(
            f"--mesh={text}: data = {data} does not divide among {slices} slices of {each} chips; expected "
            f"DATAxFSDPxTENSOR with data a multiple of {slices}, such as {slices}x{each // tensor}x{tensor}"
        )
    within, across = (data // slices, fsdp, tensor), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=axis_types)


class Rows(NamedTuple):
    """The rows of a batch that concern a process, in ascending order.

    Attributes:
      held: the rows on its devices, whose data it must have.
      own: the held rows that it alone handles: every row of the batch is owned by exactly one process.
    """

    held: list[int]
    own: list[int]


def batch_rows(mesh: jax.sharding.Mesh, size: int, process: int) -> Rows:
    """A process's share of ``size`` rows sharded as a batch. Several processes may hold a row if tensor spans them."""
    holders: dict[int, set[int]] = {}
    places = jax.sharding.NamedSharding(mesh, TRAIN.spec("batch")).devices_indices_map((size,))
    for device in mesh.devices.flat:
        index = places[device]
        assert index is not None
        for row in range(size)[index[0]]:
            holders.setdefault(row, set()).add(device.process_index)
    held = [row for row in range(size) if process in holders[row]]
    return Rows(held, [row for row in held if sorted(holders[row])[row % len(holders[row])] == process])


def kv_copies(kv_heads: int) -> int:
    """How often each key-value head is repeated so that the ambient mesh's tensor axis divides them."""
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    return 1 if kv_heads % tensor == 0 else tensor // kv_heads
