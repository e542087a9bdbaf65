"""Norms, rotary embeddings and parameter creation, shared by the decoder and the vision tower."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from segzero_jax.types import Array

Initializer = Callable[[jax.Array, tuple[int, ...], PartitionSpec], jax.Array]


def normal_param(key: jax.Array, shape: tuple[int, ...], spec: PartitionSpec, scale: float = 0.02) -> nnx.Param:
    """A float32 parameter drawn from N(0, scale²), born sharded."""
    return nnx.Param(scale * jax.random.normal(key, shape, jnp.float32, out_sharding=spec))


def constant_param(value: float, shape: tuple[int, ...], spec: PartitionSpec) -> nnx.Param:
    """A float32 parameter of one value, born sharded."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec))


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis: statistics in float32, the scale in ``x``'s dtype, as in Qwen2.5-VL."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale_d.astype(x.dtype)


def mrope_angles(positions_b3t: Array, sections: tuple[int, int, int], theta: float) -> jax.Array:
    """Rotation angles of multimodal RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1): [b, t, sum(sections)], float32.

    The frequencies are dealt out in three runs: the first ``sections[0]`` turn with the temporal position,
    the next with the row, the last with the column.
    """
    half = sum(sections)
    frequencies = theta ** -(np.arange(half, dtype=np.float32) / np.float32(half))
    axis_of_frequency = np.repeat(np.arange(3), sections)
    positions_bt3 = jnp.moveaxis(jnp.asarray(positions_b3t), 1, 2).astype(jnp.float32)
    # A one-hot product rather than a gather: it keeps the sharding of the batch without a word.
    picked_btf = positions_bt3 @ jnp.asarray(np.eye(3, dtype=np.float32)[:, axis_of_frequency])
    return picked_btf * frequencies


def axial_angles(patch_hw_bs2: Array, head_width: int, theta: float = 10000.0) -> jax.Array:
    """Rotation angles of the vision tower, [b, s, h / 2]: half of them turn with the row, half with the column."""
    quarter = head_width // 4
    frequencies = theta ** -(np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    hw = jnp.asarray(patch_hw_bs2).astype(jnp.float32)
    return jnp.concatenate([hw[..., :1] * frequencies, hw[..., 1:] * frequencies], axis=-1)


def rotate(x_btnh: jax.Array, angles_bth: jax.Array) -> jax.Array:
    """Applies rotary embeddings to halves of the head width, in float32.

    Args:
      x_btnh: queries or keys.
      angles_bth: [b, t, h / 2].
    """
    cos, sin = jnp.cos(angles_bth)[:, :, None], jnp.sin(angles_bth)[:, :, None]
    left, right = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_btnh.dtype)
