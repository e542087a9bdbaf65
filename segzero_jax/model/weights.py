"""Converts Hugging Face checkpoints to the policy's tree and back; checks that a mesh can hold the policy.

Both key forms are read: the hub's (``visual.*``, ``model.*``, ``lm_head.weight``) and the one that transformers 5 keeps
in memory (``model.visual.*``, ``model.language_model.*``). The hub's form is written. Files are memory-mapped and a
weight's transpose is a view, so a host reads only the bytes that its shards need.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from segzero_jax.hub import HubAway, HubError, model_directory
from segzero_jax.mesh import AXES, ROLLOUT, TRAIN, Layout, MeshError
from segzero_jax.model.dims import Dims, ModelConfigError, from_hf, with_dtype
from segzero_jax.model.hf_layout import ENTRIES, Entry, hub_key
from segzero_jax.model.policy import Policy
from segzero_jax.model.tensor_files import (
    CheckpointError,
    StorageError,
    StoredTensor,
    find_tensors,
    read_json,
    write_tensors,
)

_CARRIED = (
    *("*config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("chat_template.*", "added_tokens.json", "special_tokens_map.json", "LICENSE*"),
)
# PEFT marks adapters stored without their base model with this file; nothing here loads those.
ADAPTER_CONFIG = "adapter_config.json"
ALONE = "holds adapters alone; expected a whole model: the run itself, or an export without --adapters"
_CHECKED_BYTES = 64 << 20  # checked for NaN at once; bounds the scratch memory of the check


def resolve(path: str | Path, *, weights: bool = True) -> Path:
    """The directory of a checkpoint, with or without its weights (see ``hub.model_directory``).

    Raises:
      CheckpointError: there is no such checkpoint.
      StorageError: the checkpoint is on the hub, which cannot be reached now.
    """
    try:
        directory = model_directory(path, weights=weights)
    except HubAway as error:
        raise StorageError(f"model.path={error}") from None
    except HubError as error:
        raise CheckpointError(f"model.path={error}") from None
    if not (directory / "config.json").is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"model.path={path}: {ALONE}")
        raise CheckpointError(
            f"model.path={path}: no config.json there; expected a Hugging Face checkpoint's directory on this machine, "
            "such as segzero_jax.export makes of a run, a hub id such as Qwen/Qwen2.5-VL-7B-Instruct, or 'toy'"
        )
    return directory


def read_dims(path: str | Path) -> Dims:
    """The dimensions in a checkpoint's config.json; downloads no weights from the hub. Raises CheckpointError."""
    file = resolve(path, weights=False) / "config.json"
    try:
        return from_hf(read_json(file))
    except ModelConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def abstract_policy(dims: Dims, layout: Layout = TRAIN) -> Policy:
    """Shapes and shardings of a policy under the ambient mesh, without values."""
    return jax.eval_shape(lambda: Policy(dims, layout, jax.random.key(0)))


def check_fits(mesh: jax.sharding.Mesh, dims: Dims, batch: int, micro_batch: int) -> None:
    """Checks that the policy and its batch divide evenly over a mesh, in training and in rollout.

    Args:
      mesh: the mesh.
      dims: the policy's dimensions.
      batch, micro_batch: number of prompts in each; activations are split by prompt.

    Raises:
      MeshError: something does not divide; names the first such size, its divisor and the axes.
    """
    vision = dims.vision
    divided = (
        (batch, "prompts", "batch"),
        (micro_batch, "prompts of a micro-batch", "batch"),
        (dims.hidden, "units of the model width", "embed"),
        (dims.heads, "attention heads", "heads"),
        (dims.mlp, "MLP units", "mlp"),
        (dims.vocab, "vocabulary entries", "vocab"),
        (vision.hidden, "units of the vision tower's width", "embed"),
        (vision.heads, "attention heads of the vision tower", "heads"),
        (vision.mlp, "MLP units of the vision tower", "vision_mlp"),
        (vision.hidden * vision.merge**2, "units of the vision merger", "vision_mlp"),
        (vision.out, "units of the vision output", "embed"),
    )
    label = "x".join(str(mesh.shape[axis]) for axis in AXES).removeprefix("1x")
    for layout in (TRAIN, ROLLOUT):
        for size, name, axis in divided:
            over = layout.over(axis)
            count = math.prod(mesh.shape[mesh_axis] for mesh_axis in over)
            if size % count:
                raise MeshError(
                    f"--mesh={label}: {size} {name} cannot be split evenly over {' x '.join(over)} = {count} "
                    f"({layout.name}); choose another mesh or size"
                )
    tensor = mesh.shape["tensor"]
    if dims.kv_heads % tensor and tensor % dims.kv_heads:
        raise MeshError(
            f"--mesh={label}: {dims.kv_heads} key-value heads and tensor = {tensor}: neither is a multiple of the "
            "other; choose another mesh"
        )


def _leaves(policy: Policy) -> dict[tuple[str, ...], Any]:
    """Parameters by their path, without the last key, which flax adds to every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(policy)
    return {tuple(key.name for key in path[:-1]): leaf for path, leaf in leaves}


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the tree and the stored tensors it is read from: one per layer if stacked, else a single one.

    Attributes:
      leaf: the parameter's shape and sharding in the tree.
      shape: the shape in the tree of the values that one tensor holds.
    """

    entry: Entry
    leaf: jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    tensors: list[StoredTensor]


def load_hf(path: str | Path, layout: Layout = TRAIN, dtype: Any = jnp.float32) -> tuple[Policy, Dims]:
    """Reads a Hugging Face checkpoint straight into the ambient mesh's shards (see ``jax.set_mesh``).

    A process reads the bytes that its own devices' shards need and checks that the values are finite. At any time the
    host holds one device's shard of one parameter, with all its layers (docs/checkpoints.md gives the memory use).

    Args:
      path: a directory with config.json and safetensors files (one or many), a hub id, or "toy".
      layout: the table that shards the weights.
      dtype: the dtype that the weights are cast to.

    Raises:
      CheckpointError: there is no checkpoint, or a tensor (named in the message) is missing, left over, misshapen, of
        an unknown dtype, or holds NaN or Inf. If only one of several hosts raises, its ``Pod`` must end the others.
    """
    dims = read_dims(path)
    target = abstract_policy(dims, layout)
    found = _match(resolve(path), target, dims)
    loaded = [_place(parameter, jnp.dtype(dtype)) for parameter in found]
    return jax.tree.unflatten(jax.tree.structure(target), loaded), dims


def _match(directory: Path, target: Policy, dims: Dims) -> list[_Parameter]:
    """The parameters in the order of the tree's leaves; reads only the files' headers. Raises CheckpointError."""
    stored = {hub_key(key): tensor for key, tensor in find_tensors(directory).items()}
    found = []
    for tree_path, leaf in _leaves(target).items():
        entry = ENTRIES[tree_path]
        shape = leaf.shape[1:] if entry.stacked else leaf.shape
        file_shape = entry.file_shape(shape, dims)
        keys = entry.keys(leaf.shape)
        for key in keys:
            if key not in stored:
                raise CheckpointError(f"{directory}: {key} is missing")
            if stored[key].shape != file_shape:
                raise CheckpointError(
                    f"{stored[key].file}: {key} has shape {list(stored[key].shape)}; "
                    f"config.json means {list(file_shape)}"
                )
        found.append(_Parameter(entry, leaf, shape, [stored.pop(key) for key in keys]))
    if dims.tied:
        stored.pop("lm_head.weight", None)  # a file may repeat the embedding under this name
    if stored:
        raise CheckpointError(
            f"{directory}: {min(stored)} belongs to no parameter of this policy ({len(stored)} such tensors)"
        )
    return found


def _place(parameter: _Parameter, dtype: np.dtype) -> jax.Array:
    """Puts a parameter on its devices, one shard after another; a shard that several devices hold is read once."""
    shape = parameter.leaf.shape
    sharding = NamedSharding(jax.sharding.get_mesh(), parameter.leaf.sharding.spec)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    placed: dict[jax.Device, jax.Array] = {}
    for bounds, devices in holders.items():
        shard = _read_shard(parameter, bounds, dtype)
        placed |= {device: jax.device_put(shard, device) for device in devices}
        # An unfinished transfer keeps its shard on the host.
        jax.block_until_ready([placed[device] for device in devices])
    arrays = [placed[device] for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)


def _read_shard(parameter: _Parameter, bounds: tuple[tuple[int, int], ...], dtype: np.dtype) -> np.ndarray:
    """Reads and casts part of a parameter; copies it, since a jax.Array on CPU may alias the memory it is made from."""
    entry, tensors = parameter.entry, parameter.tensors
    shard = np.empty([stop - start for start, stop in bounds], dtype)
    layers, inner = shard[None], bounds
    if entry.stacked:
        layers, tensors, inner = shard, tensors[slice(*bounds[0])], bounds[1:]
    at = tuple(slice(*bound) for bound in inner)
    for layer, tensor in zip(layers, tensors, strict=True):
        layer[...] = tensor.view().reshape(entry.factored(parameter.shape)).transpose(entry.order)[at]
        if not _is_finite(layer):
            raise CheckpointError(
                f"{tensor.file}: {tensor.key} holds NaN or Inf; expected finite weights: get or export the file anew"
            )
    return shard


def _is_finite(values: np.ndarray) -> bool:
    pieces = max(1, values.nbytes // _CHECKED_BYTES)
    with np.errstate(invalid="ignore"):  # isfinite itself warns on bfloat16
        return all(np.isfinite(piece).all() for piece in np.array_split(values, pieces))


def _in_files(policy: Policy, dims: Dims, dtype: np.dtype) -> tuple[dict[str, int], Iterator[tuple[str, np.ndarray]]]:
    """The policy's weights under hub keys and in file layout, layer by layer: their sizes in bytes, and their values.

    A value is gathered to the host when the iterator yields it; every process must iterate over all of them, in order.
    """
    parts = [
        (layer, key, ENTRIES[path], leaf)
        for path, leaf in _leaves(policy).items()
        for layer, key in enumerate(ENTRIES[path].keys(leaf.shape))
    ]
    parts.sort(key=lambda part: part[0])
    sizes = {
        key: leaf.size // (leaf.shape[0] if entry.stacked else 1) * dtype.itemsize for _, key, entry, leaf in parts
    }

    def values() -> Iterator[tuple[str, np.ndarray]]:
        for layer, key, entry, leaf in parts:
            # The layer index is an operand, so that one program serves all layers.
            part = jax.lax.dynamic_index_in_dim(leaf, np.int32(layer), keepdims=False) if entry.stacked else leaf
            # Cast on the host: a device may flush bfloat16 denormals to zero.
            value = np.asarray(multihost_utils.process_allgather(part, tiled=True)).astype(dtype)
            in_file = value.transpose(np.argsort(entry.order)).reshape(entry.file_shape(value.shape, dims))
            yield key, np.ascontiguousarray(in_file)

    return sizes, values()


def file_tensors(policy: Policy, dims: Dims, dtype: Any) -> dict[str, np.ndarray]:
    """The policy's weights under hub keys and in file layout, all of them on the host."""
    return dict(_in_files(policy, dims, np.dtype(dtype))[1])


def save_hf(
    policy: Policy,
    dims: Dims,
    directory: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    carry_from: str | Path | None = None,
    max_file_bytes: int = 4 << 30,
) -> list[Path]:
    """Writes safetensors files and their index and, with ``carry_from``, everything else that ``transformers`` loads.

    Tensors are gathered one by one, so the host holds one file's worth. Every process must call it; process 0 writes,
    and all return once the files exist.

    Args:
      policy: the policy, on the ambient mesh.
      dtype: the dtype that the weights are rounded to; a copied config.json names it.
      carry_from: a checkpoint whose config, tokenizer, processor and licence files are copied.
      max_file_bytes: the size at which a new file is begun.

    Returns:
      The files written; empty in all processes but process 0.
    """
    directory, dtype = Path(directory).expanduser(), np.dtype(dtype)
    sizes, tensors = _in_files(policy, dims, dtype)
    written = []
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        written = write_tensors(sizes, tensors, directory, max_file_bytes)
        if carry_from is not None:
            written += _carry(resolve(carry_from, weights=False), directory, dtype.name)
    else:
        for _ in tensors:
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_hf")
    return written


def _carry(source: Path, directory: Path, dtype: str) -> list[Path]:
    """Copies a checkpoint's other files; sets the weights' new dtype in config.json."""
    carried = []
    for file in sorted(file for pattern in _CARRIED for file in source.glob(pattern)):
        content = file.read_bytes()
        if file.name == "config.json":
            content = (json.dumps(with_dtype(read_json(file), dtype), indent=2) + "\n").encode()
        (directory / file.name).write_bytes(content)
        carried.append(directory / file.name)
    return carried
