"""Hugging Face checkpoints to the policy's tree and back.

Both key forms are read: the hub's (``visual.*``, ``model.*``, ``lm_head.weight``) and the one transformers 5 keeps in
memory (``model.visual.*``, ``model.language_model.*``); the hub's is written. Files are mapped into memory and a
weight's transposition is a view, so a host reads only the bytes that its shards need.
"""

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from safetensors.numpy import save_file

from segzero_jax.mesh import TRAIN, Layout
from segzero_jax.model.dims import Dims, ModelConfigError, from_hf
from segzero_jax.model.policy import Policy

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_TOY = Path(__file__).parent.parent / "assets" / "toy_policy"


class CheckpointError(ValueError):
    """A checkpoint that does not hold the policy: names the file or tensor, what was found and what was expected."""


@dataclass(frozen=True)
class _Entry:
    """How one parameter of the tree lies in the file.

    Attributes:
      hf: hub key, with ``{}`` for the layer where the parameter is stacked.
      order: the permutation that turns ``split`` into the tree's axes.
    """

    hf: str
    order: tuple[int, ...] = ()


def _linear(hf: str, out_axes: int = 1, in_axes: int = 1) -> _Entry:
    """A torch Linear ``[out, in]`` held as ``[in, out]``, either side possibly factored."""
    axes = tuple(range(out_axes + in_axes))
    return _Entry(hf, order=axes[out_axes:] + axes[:out_axes])


_ENTRIES: dict[tuple[str, ...], _Entry] = {
    ("embed_vd",): _Entry("model.embed_tokens.weight"),
    ("head_vd",): _Entry("lm_head.weight"),
    ("final_norm_d",): _Entry("model.norm.weight"),
    ("blocks", "norm1_d"): _Entry("model.layers.{}.input_layernorm.weight"),
    ("blocks", "norm2_d"): _Entry("model.layers.{}.post_attention_layernorm.weight"),
    ("blocks", "q_dnh"): _linear("model.layers.{}.self_attn.q_proj.weight", out_axes=2),
    ("blocks", "q_bias_nh"): _Entry("model.layers.{}.self_attn.q_proj.bias"),
    ("blocks", "k_dkh"): _linear("model.layers.{}.self_attn.k_proj.weight", out_axes=2),
    ("blocks", "k_bias_kh"): _Entry("model.layers.{}.self_attn.k_proj.bias"),
    ("blocks", "v_dkh"): _linear("model.layers.{}.self_attn.v_proj.weight", out_axes=2),
    ("blocks", "v_bias_kh"): _Entry("model.layers.{}.self_attn.v_proj.bias"),
    ("blocks", "o_nhd"): _linear("model.layers.{}.self_attn.o_proj.weight", in_axes=2),
    ("blocks", "gate_df"): _linear("model.layers.{}.mlp.gate_proj.weight"),
    ("blocks", "up_df"): _linear("model.layers.{}.mlp.up_proj.weight"),
    ("blocks", "down_fd"): _linear("model.layers.{}.mlp.down_proj.weight"),
    ("vision", "patch_cd"): _linear("visual.patch_embed.proj.weight"),
    ("vision", "blocks", "norm1_d"): _Entry("visual.blocks.{}.norm1.weight"),
    ("vision", "blocks", "norm2_d"): _Entry("visual.blocks.{}.norm2.weight"),
    ("vision", "blocks", "qkv_d3nh"): _linear("visual.blocks.{}.attn.qkv.weight", out_axes=3),
    ("vision", "blocks", "qkv_bias_3nh"): _Entry("visual.blocks.{}.attn.qkv.bias"),
    ("vision", "blocks", "out_nhd"): _linear("visual.blocks.{}.attn.proj.weight", in_axes=2),
    ("vision", "blocks", "out_bias_d"): _Entry("visual.blocks.{}.attn.proj.bias"),
    ("vision", "blocks", "gate_df"): _linear("visual.blocks.{}.mlp.gate_proj.weight"),
    ("vision", "blocks", "gate_bias_f"): _Entry("visual.blocks.{}.mlp.gate_proj.bias"),
    ("vision", "blocks", "up_df"): _linear("visual.blocks.{}.mlp.up_proj.weight"),
    ("vision", "blocks", "up_bias_f"): _Entry("visual.blocks.{}.mlp.up_proj.bias"),
    ("vision", "blocks", "down_fd"): _linear("visual.blocks.{}.mlp.down_proj.weight"),
    ("vision", "blocks", "down_bias_d"): _Entry("visual.blocks.{}.mlp.down_proj.bias"),
    ("vision", "merger_norm_d"): _Entry("visual.merger.ln_q.weight"),
    ("vision", "merger_up_df"): _linear("visual.merger.mlp.0.weight"),
    ("vision", "merger_up_bias_f"): _Entry("visual.merger.mlp.0.bias"),
    ("vision", "merger_down_fd"): _linear("visual.merger.mlp.2.weight"),
    ("vision", "merger_down_bias_d"): _Entry("visual.merger.mlp.2.bias"),
}


def resolve(path: str | Path) -> Path:
    """A checkpoint directory; "toy" is the one inside the package. Raises CheckpointError when there is none."""
    directory = _TOY if str(path) == "toy" else Path(path).expanduser()
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"model.path={path}: no config.json there; expected a Hugging Face checkpoint directory or 'toy'")
    return directory


def read_dims(path: str | Path) -> Dims:
    """The dimensions in a checkpoint directory's config.json."""
    file = resolve(path) / "config.json"
    try:
        return from_hf(json.loads(file.read_text()))
    except (json.JSONDecodeError, ModelConfigError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def abstract_policy(dims: Dims, layout: Layout = TRAIN) -> Policy:
    """Shapes and shardings of a policy under the ambient mesh, without its numbers."""
    return jax.eval_shape(partial(Policy, dims, layout), jax.random.key(0))


def _flatten(policy: Policy) -> dict[tuple[str, ...], Any]:
    return dict(nnx.to_flat_state(nnx.state(policy)))


def _hub_key(key: str) -> str:
    for prefix, hub in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if key.startswith(prefix):
            return hub + key.removeprefix(prefix)
    return key


class _Files:
    """The tensors of a checkpoint directory as memory-mapped views, by hub key."""

    def __init__(self, directory: Path):
        self.views: dict[str, np.ndarray] = {}
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: no *.safetensors file there")
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            listed = set(json.loads(index.read_text())["weight_map"].values())
            absent = sorted(listed - {file.name for file in files})
            if absent:
                raise CheckpointError(f"{directory}: {index.name} lists {absent[0]}, which is not there")
            files = [file for file in files if file.name in listed]
        for file in files:
            for key, view in _read_safetensors(file):
                self.views[_hub_key(key)] = view


def _read_safetensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    # The format (github.com/huggingface/safetensors): a little-endian header length, a JSON header, the tensors.
    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise CheckpointError(f"{file}: cut short: header of {length} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + length])
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: {key} has dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        start, end = entry["data_offsets"]
        if 8 + length + end > len(data):
            raise CheckpointError(f"{file}: cut short: {key} ends at byte {8 + length + end} of {len(data)}")
        dtype = _DTYPES[entry["dtype"]]
        count = (end - start) // dtype.itemsize
        yield key, np.frombuffer(data, dtype, count, 8 + length + start).reshape(entry["shape"])


def _tree_view(view: np.ndarray, entry: _Entry, shape: tuple[int, ...], key: str) -> np.ndarray:
    """A file tensor in the tree's axes, without copying."""
    split = tuple(shape[entry.order.index(axis)] for axis in range(len(shape))) if entry.order else shape
    if view.size != int(np.prod(split)) or not _refines(view.shape, split):
        raise CheckpointError(f"{key}: shape {list(view.shape)}; expected {list(_merged_like(view.shape, split))}")
    split_view = view.reshape(split)
    return split_view.transpose(entry.order) if entry.order else split_view


def _refines(file_shape: tuple[int, ...], split: tuple[int, ...]) -> bool:
    """Whether one shape is the other with neighbouring axes multiplied, so that a reshape moves no element across axes."""
    short, long = sorted((file_shape, split), key=len)
    return _merged_like(short, long) == short


def _merged_like(target: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(target) >= len(shape):
        return shape
    merged, rest = [], list(shape)
    for position, size in enumerate(target):
        product = rest.pop(0)
        while rest and product < size and len(rest) > len(target) - position - 1:
            product *= rest.pop(0)
        merged.append(product)
    for left in rest:
        merged[-1] *= left
    return tuple(merged)


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
    files = _Files(directory)
    mesh = jax.sharding.get_mesh()
    target = abstract_policy(dims, layout)
    flat = _flatten(target)
    wanted: set[str] = set()
    loaded = {}
    for tree_path, variable in flat.items():
        entry, leaf = _ENTRIES[tree_path], variable.get_value() if hasattr(variable, "get_value") else variable[...]
        stacked = "{}" in entry.hf
        keys = [entry.hf.format(i) for i in range(leaf.shape[0])] if stacked else [entry.hf]
        wanted.update(keys)
        for key in keys:
            if key not in files.views:
                raise CheckpointError(f"{directory}: {key} is missing")
        shape = leaf.shape[1:] if stacked else leaf.shape
        views = [_tree_view(files.views[key], entry, shape, f"{directory}: {key}") for key in keys]
        read = _reader(views, stacked, jnp.dtype(dtype))
        loaded[tree_path] = jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, leaf.sharding.spec), read)
    extra = sorted(files.views.keys() - wanted - ({"lm_head.weight"} if dims.tied else set()))
    if extra:
        raise CheckpointError(f"{directory}: {extra[0]} belongs to no parameter of this policy ({len(extra)} such tensors)")
    graph = nnx.graphdef(target)
    state = nnx.from_flat_state({path: flat[path].replace(value) for path, value in loaded.items()})
    return nnx.merge(graph, state), dims


def _reader(views: list[np.ndarray], stacked: bool, dtype: jnp.dtype) -> Callable[[Any], np.ndarray]:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return np.asarray(views[0][index], dtype=dtype)
        return np.stack([np.asarray(view[index[1:]], dtype=dtype) for view in views[index[0]]])

    return read


def file_tensors(policy: Policy, dims: Dims, dtype: Any) -> dict[str, np.ndarray]:
    """The policy's weights under hub keys and in file layout, gathered to the host."""
    tensors = {}
    for tree_path, variable in _flatten(policy).items():
        entry = _ENTRIES[tree_path]
        values = np.asarray(jax.device_get(variable[...])).astype(dtype)
        stacked = "{}" in entry.hf
        for i, value in enumerate(values if stacked else [values]):
            value = value.transpose(np.argsort(entry.order)) if entry.order else value
            tensors[entry.hf.format(i)] = np.ascontiguousarray(value.reshape(_file_shape(entry.hf, value.shape, dims)))
    return tensors


def _file_shape(key: str, split: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    vision = dims.vision
    if key.endswith("patch_embed.proj.weight"):
        return (vision.hidden, vision.channels, vision.temporal_patch, vision.patch, vision.patch)
    if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "qkv.weight")):
        return (-1, split[-1])
    if key.endswith(("o_proj.weight", "attn.proj.weight")):
        return (split[0], -1)
    return (-1,) if key.endswith(".bias") else split


def save_hf(
    policy: Policy,
    dims: Dims,
    directory: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    carry_from: str | Path | None = None,
    max_file_bytes: int = 4 << 30,
) -> list[Path]:
    """Writes a directory that ``transformers`` loads: config.json, safetensors shards and their index.

    Args:
      dtype: what the weights are rounded to.
      carry_from: a checkpoint directory whose config, tokenizer and processor files are copied along.
      max_file_bytes: a new shard begins before a file grows past this.

    Returns:
      The files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    source = resolve(carry_from) if carry_from is not None else None
    written = []
    for file in sorted(source.glob("*.json")) if source else []:
        if file.name != "model.safetensors.index.json" and file.resolve().parent != directory.resolve():
            (directory / file.name).write_bytes(file.read_bytes())
            written.append(directory / file.name)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, tensor in file_tensors(policy, dims, dtype).items():
        if size + tensor.nbytes > max_file_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, str(directory / name), metadata={"format": "pt"})
        written.append(directory / name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        written.append(directory / "model.safetensors.index.json")
    return written
