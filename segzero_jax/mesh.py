"""Devices, the mesh, and the one table of shardings.

Model code names logical axes ("heads", "mlp", "batch"); only this file knows mesh axes. Two layouts of
one set of weights: TRAIN shards parameters FSDP x tensor and gathers a weight where it is used; ROLLOUT
keeps every weight where it is (heads over tensor; MLP and vocabulary over both axes) so that a
decode step moves activations only.

Mesh axes are ``Explicit``: an array's sharding is part of its type, and an operation whose result is
ambiguous asks for ``out_sharding``.
"""

import os
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
      mlp_batch: prompts, inside the MLP and the output head.
      embed: rows of a weight matrix along the model width.
      heads: attention heads of queries, and of keys and values when there are enough of them.
      mlp, vocab: hidden units of the decoder's MLP; the vocabulary.
      vision_mlp: hidden units of the vision tower's MLP.
    """

    name: str
    batch: str | tuple[str, ...] | None
    mlp_batch: str | tuple[str, ...] | None
    embed: str | tuple[str, ...] | None
    heads: str | None
    mlp: str | tuple[str, ...] | None
    vocab: str | tuple[str, ...] | None
    vision_mlp: str | None

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions carry these logical axes."""
        return PartitionSpec(*(getattr(self, axis) if axis else None for axis in axes))


TRAIN = Layout("train", _BATCH, _BATCH, "fsdp", "tensor", "tensor", "tensor", "tensor")
ROLLOUT = Layout("rollout", _BATCH, "data", None, "tensor", _BOTH, _BOTH, "tensor")


def parse_mesh(text: str) -> tuple[int, int, int]:
    """``"4x4"`` (fsdp x tensor) or ``"2x4x4"`` (data x fsdp x tensor) -> (data, fsdp, tensor). Raises MeshError."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise MeshError(f"--mesh={text}: expected FSDPxTENSOR or DATAxFSDPxTENSOR, such as 4x4 or 2x4x4")
    data, fsdp, tensor = (1, *map(int, parts))[-3:]
    return data, fsdp, tensor


def simulate_devices(count: int) -> None:
    """Lets a CPU-only host show ``count`` virtual devices. Call before JAX touches a device; without effect on TPU and GPU."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def make_mesh(text: str) -> jax.sharding.Mesh:
    """Builds the mesh over the first devices of this job.

    Raises:
      MeshError: the text is no mesh, or the job has fewer devices, or an accelerator job has more.
    """
    shape = parse_mesh(text)
    devices = jax.devices()
    needed = shape[0] * shape[1] * shape[2]
    if needed > len(devices) or (needed < len(devices) and devices[0].platform == "tpu"):
        kind = devices[0].device_kind
        raise MeshError(f"--mesh={text}: needs {needed} devices, this job has {len(devices)} ({kind}); choose factors of that")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[:needed])


def check_fits(mesh: jax.sharding.Mesh, *, batch: int, heads: int, kv_heads: int, sizes: dict[str, tuple[int, str]]) -> None:
    """Refuses a mesh that cannot hold the model or the batch.

    Args:
      mesh: the mesh.
      batch: prompts that must divide over data x fsdp.
      heads, kv_heads: attention heads; fewer key-value heads than the tensor axis are replicated up to it.
      sizes: what is divided: name -> (size, "fsdp", "tensor" or "fsdp*tensor").

    Raises:
      MeshError: names what does not divide by what.
    """
    shape = dict(mesh.shape)
    label = "x".join(str(shape[axis]) for axis in AXES)
    tensor, rows = shape["tensor"], shape["data"] * shape["fsdp"]
    if batch % rows:
        raise MeshError(f"--mesh={label}: {batch} prompts do not divide over data x fsdp = {rows}")
    if heads % tensor:
        raise MeshError(f"--mesh={label}: {heads} attention heads do not divide over tensor = {tensor}")
    if kv_heads % tensor and tensor % kv_heads:
        raise MeshError(f"--mesh={label}: {kv_heads} key-value heads and tensor = {tensor}: neither divides the other")
    for name, (size, over) in sizes.items():
        count = 1
        for axis in over.split("*"):
            count *= shape[axis]
        if size % count:
            raise MeshError(f"--mesh={label}: {name} {size} does not divide over {over} = {count}")


def kv_copies(kv_heads: int) -> int:
    """How often each key-value head is repeated so that the ambient mesh's tensor axis divides them."""
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    return 1 if kv_heads % tensor == 0 else tensor // kv_heads


def named(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> NamedSharding:
    """A sharding on ``mesh``."""
    return NamedSharding(mesh, spec)
