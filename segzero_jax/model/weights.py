"""Hugging Face checkpoints to the policy's tree and back, and whether a mesh can hold the policy.

Both key forms are read: the hub's (``visual.*``, ``model.*``, ``lm_head.weight``) and the one transformers 5 keeps in
memory (``model.visual.*``, ``model.language_model.*``); the hub's is written. Files are mapped into memory and a
weight's transposition is a view, so a host reads only the bytes that its shards need.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from segzero_jax.config import model_directory
from segzero_jax.mesh import AXES, ROLLOUT, TRAIN, Layout, MeshError
from segzero_jax.model.dims import Dims, ModelConfigError, from_hf
from segzero_jax.model.policy import Policy
from segzero_jax.model.tensor_files import CheckpointError, map_tensors, read_json, write_tensors

_CARRIED = (
    *("*config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("chat_template.*", "added_tokens.json", "special_tokens_map.json"),
)


@dataclass(frozen=True)
class _Entry:
    """How one parameter of the tree lies in the file.

    Attributes:
      hf: hub key, with ``{}`` for the layer where the parameter is stacked.
      factors: for each axis in the file, in how many axes the tree holds it.
      transposed: a torch Linear: ``[out, in]`` in the file, ``[in, out]`` in the tree.
    """

    hf: str
    factors: tuple[int, ...] = (1,)
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation from the file's axes, factored, to the tree's."""
        axes, first = tuple(range(sum(self.factors))), self.factors[0]
        return axes[first:] + axes[:first] if self.transposed else axes

    def factored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tree's shape in the order of the file."""
        return tuple(shape[self.order.index(axis)] for axis in range(len(shape)))

    def file_shape(self, shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
        """The shape in the file of what has ``shape`` in the tree."""
        vision = dims.vision
        if self.hf.endswith("patch_embed.proj.weight"):  # a convolution
            return (vision.hidden, vision.channels, vision.temporal_patch, vision.patch, vision.patch)
        rest = iter(self.factored(shape))
        return tuple(math.prod(next(rest) for _ in range(count)) for count in self.factors)


def _linear(hf: str, out_axes: int = 1, in_axes: int = 1) -> _Entry:
    return _Entry(hf, (out_axes, in_axes), transposed=True)


def _bias(hf: str, axes: int = 1) -> _Entry:
    return _Entry(hf, (axes,))


_ENTRIES: dict[tuple[str, ...], _Entry] = {
    ("embed_vd",): _Entry("model.embed_tokens.weight", (1, 1)),
    ("head_vd",): _Entry("lm_head.weight", (1, 1)),
    ("final_norm_d",): _Entry("model.norm.weight"),
    ("blocks", "norm1_d"): _Entry("model.layers.{}.input_layernorm.weight"),
    ("blocks", "norm2_d"): _Entry("model.layers.{}.post_attention_layernorm.weight"),
    ("blocks", "q_dnh"): _linear("model.layers.{}.self_attn.q_proj.weight", out_axes=2),
    ("blocks", "q_bias_nh"): _bias("model.layers.{}.self_attn.q_proj.bias", 2),
    ("blocks", "k_dkh"): _linear("model.layers.{}.self_attn.k_proj.weight", out_axes=2),
    ("blocks", "k_bias_kh"): _bias("model.layers.{}.self_attn.k_proj.bias", 2),
    ("blocks", "v_dkh"): _linear("model.layers.{}.self_attn.v_proj.weight", out_axes=2),
    ("blocks", "v_bias_kh"): _bias("model.layers.{}.self_attn.v_proj.bias", 2),
    ("blocks", "o_nhd"): _linear("model.layers.{}.self_attn.o_proj.weight", in_axes=2),
    ("blocks", "gate_df"): _linear("model.layers.{}.mlp.gate_proj.weight"),
    ("blocks", "up_df"): _linear("model.layers.{}.mlp.up_proj.weight"),
    ("blocks", "down_fd"): _linear("model.layers.{}.mlp.down_proj.weight"),
    ("vision", "patch_cd"): _linear("visual.patch_embed.proj.weight"),
    ("vision", "blocks", "norm1_d"): _Entry("visual.blocks.{}.norm1.weight"),
    ("vision", "blocks", "norm2_d"): _Entry("visual.blocks.{}.norm2.weight"),
    ("vision", "blocks", "qkv_d3nh"): _linear("visual.blocks.{}.attn.qkv.weight", out_axes=3),
    ("vision", "blocks", "qkv_bias_3nh"): _bias("visual.blocks.{}.attn.qkv.bias", 3),
    ("vision", "blocks", "out_nhd"): _linear("visual.blocks.{}.attn.proj.weight", in_axes=2),
    ("vision", "blocks", "out_bias_d"): _bias("visual.blocks.{}.attn.proj.bias"),
    ("vision", "blocks", "gate_df"): _linear("visual.blocks.{}.mlp.gate_proj.weight"),
    ("vision", "blocks", "gate_bias_f"): _bias("visual.blocks.{}.mlp.gate_proj.bias"),
    ("vision", "blocks", "up_df"): _linear("visual.blocks.{}.mlp.up_proj.weight"),
    ("vision", "blocks", "up_bias_f"): _bias("visual.blocks.{}.mlp.up_proj.bias"),
    ("vision", "blocks", "down_fd"): _linear("visual.blocks.{}.mlp.down_proj.weight"),
    ("vision", "blocks", "down_bias_d"): _bias("visual.blocks.{}.mlp.down_proj.bias"),
    ("vision", "merger_norm_d"): _Entry("visual.merger.ln_q.weight"),
    ("vision", "merger_up_df"): _linear("visual.merger.mlp.0.weight"),
    ("vision", "merger_up_bias_f"): _bias("visual.merger.mlp.0.bias"),
    ("vision", "merger_down_fd"): _linear("visual.merger.mlp.2.weight"),
    ("vision", "merger_down_bias_d"): _bias("visual.merger.mlp.2.bias"),
}


def resolve(path: str | Path) -> Path:
    """A checkpoint directory; "toy" is the one inside the package. Raises CheckpointError when there is none."""
    directory = model_directory(path)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"model.path={path}: no config.json there; expected a Hugging Face checkpoint directory or 'toy'"
        )
    return directory


def read_dims(path: str | Path) -> Dims:
    """The dimensions in a checkpoint directory's config.json. Raises CheckpointError."""
    file = resolve(path) / "config.json"
    try:
        return from_hf(read_json(file))
    except ModelConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def abstract_policy(dims: Dims, layout: Layout = TRAIN) -> Policy:
    """Shapes and shardings of a policy under the ambient mesh, without its numbers."""
    return jax.eval_shape(lambda: Policy(dims, layout, jax.random.key(0)))


def check_fits(mesh: jax.sharding.Mesh, dims: Dims, batch: int, micro_batch: int) -> None:
    """Refuses a mesh over which the policy or its batch does not divide, in training or in rollout.

    Args:
      mesh: the mesh.
      dims: the policy's.
      batch, micro_batch: prompts whose activations are split by prompt.

    Raises:
      MeshError: names the first thing that does not divide, by what, and the axes.
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
                    f"--mesh={label}: {size} {name} do not divide by {' x '.join(over)} = {count} ({layout.name}); "
                    f"choose another mesh or size"
                )
    tensor = mesh.shape["tensor"]
    if dims.kv_heads % tensor and tensor % dims.kv_heads:
        raise MeshError(
            f"--mesh={label}: {dims.kv_heads} key-value heads and tensor = {tensor}: neither divides by the other; "
            "choose another mesh"
        )


def _leaves(policy: Policy) -> dict[tuple[str, ...], Any]:
    """Parameters by their path; a leaf's own last key is flax's, the same for all."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(policy)
    return {tuple(key.name for key in path[:-1]): leaf for path, leaf in leaves}


def _hub_key(key: str) -> str:
    for prefix, hub in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if key.startswith(prefix):
            return hub + key.removeprefix(prefix)
    return key


def load_hf(path: str | Path, layout: Layout = TRAIN, dtype: Any = jnp.float32) -> tuple[Policy, Dims]:
    """Reads a Hugging Face directory straight into the ambient mesh's shards (see ``jax.set_mesh``).

    Args:
      path: a directory with config.json and safetensors files (one or many), or "toy".
      layout: which table shards the weights.
      dtype: what they are cast to on the way.

    Raises:
      CheckpointError: a tensor is missing, left over, misshapen, or of an unknown dtype; it is named.
    """
    dims = read_dims(path)
    directory = resolve(path)
    views = {_hub_key(key): view for key, view in map_tensors(directory).items()}
    mesh = jax.sharding.get_mesh()
    target = abstract_policy(dims, layout)
    wanted = {"lm_head.weight"} if dims.tied else set()
    loaded = []
    for tree_path, leaf in _leaves(target).items():
        entry = _ENTRIES[tree_path]
        shape = leaf.shape[1:] if entry.stacked else leaf.shape
        file_shape = entry.file_shape(shape, dims)
        parts = []
        for key in [entry.hf.format(i) for i in range(leaf.shape[0])] if entry.stacked else [entry.hf]:
            if key not in views:
                raise CheckpointError(f"{directory}: {key} is missing")
            if views[key].shape != file_shape:
                raise CheckpointError(
                    f"{directory}: {key} has shape {list(views[key].shape)}; config.json means {list(file_shape)}"
                )
            parts.append(views[key].reshape(entry.factored(shape)).transpose(entry.order))
            wanted.add(key)
        read = _reader(parts, entry.stacked, jnp.dtype(dtype))
        loaded.append(jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, leaf.sharding.spec), read))
    extra = sorted(views.keys() - wanted)
    if extra:
        raise CheckpointError(
            f"{directory}: {extra[0]} belongs to no parameter of this policy ({len(extra)} such tensors)"
        )
    return jax.tree.unflatten(jax.tree.structure(target), loaded), dims


def _reader(parts: list[np.ndarray], stacked: bool, dtype: jnp.dtype) -> Callable[[Any], np.ndarray]:
    """What reads one shard. It copies: on a CPU an array may live in the memory it is made from, here a file's."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.array(parts[0][index], dtype=dtype, order="C")
        return np.stack([part[index[1:]].astype(dtype) for part in parts[index[0]]])

    return read


def file_tensors(policy: Policy, dims: Dims, dtype: Any) -> dict[str, np.ndarray]:
    """The policy's weights under hub keys and in file layout, gathered to the host."""
    tensors = {}
    for tree_path, leaf in _leaves(policy).items():
        entry = _ENTRIES[tree_path]
        values = np.asarray(jax.device_get(leaf)).astype(dtype)
        for i, value in enumerate(values if entry.stacked else [values]):
            in_file = value.transpose(np.argsort(entry.order)).reshape(entry.file_shape(value.shape, dims))
            tensors[entry.hf.format(i)] = np.ascontiguousarray(in_file)
    return tensors


def save_hf(
    policy: Policy,
    dims: Dims,
    directory: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    carry_from: str | Path | None = None,
    max_file_bytes: int = 4 << 30,
) -> list[Path]:
    """Writes safetensors shards and their index and, with ``carry_from``, all else that ``transformers`` loads.

    Args:
      dtype: what the weights are rounded to.
      carry_from: a checkpoint directory whose config, tokenizer and processor files are copied along.
      max_file_bytes: a new shard begins before a file grows past this.

    Returns:
      The files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    source = resolve(carry_from) if carry_from is not None else None
    if source is not None and source.resolve() != directory.resolve():
        for file in sorted(file for pattern in _CARRIED for file in source.glob(pattern)):
            (directory / file.name).write_bytes(file.read_bytes())
            written.append(directory / file.name)
    return written + write_tensors(file_tensors(policy, dims, dtype), directory, max_file_bytes)
