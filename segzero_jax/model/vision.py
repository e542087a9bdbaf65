"""The vision tower of Qwen2.5-VL: window and full attention, 2-D rotary embeddings, SwiGLU, 2x2 merger.

Patches arrive in window order, every window padded to whole size (``processor.py`` lays them out), so window
attention is a batch of small squares and needs no sequence mask.
Reference: transformers, ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segzero_jax.mesh import Layout
from segzero_jax.model.attention import KeyValue, attend
from segzero_jax.model.dims import VisionDims
from segzero_jax.model.layers import axial_angles, constant_param, normal_param, rms_norm, rotate
from segzero_jax.types import Array

_EPS = 1e-6


class VisionBlock(nnx.Module):
    """All blocks of the tower, stacked on a leading layer axis; ``jax.lax.scan`` hands them out one by one."""

    def __init__(self, dims: VisionDims, layout: Layout, key: jax.Array):
        depth, d, n, h, f = dims.depth, dims.hidden, dims.heads, dims.head_width, dims.mlp
        keys = jax.random.split(key, 5)
        spec = layout.spec
        self.norm1_d = constant_param(1.0, (depth, d), spec(None, None))
        self.norm2_d = constant_param(1.0, (depth, d), spec(None, None))
        self.qkv_d3nh = normal_param(keys[0], (depth, d, 3, n, h), spec(None, "embed", None, "heads", None))
        self.qkv_bias_3nh = constant_param(0.0, (depth, 3, n, h), spec(None, None, "heads", None))
        self.out_nhd = normal_param(keys[1], (depth, n, h, d), spec(None, "heads", None, "embed"))
        self.out_bias_d = constant_param(0.0, (depth, d), spec(None, None))
        self.gate_df = normal_param(keys[2], (depth, d, f), spec(None, "embed", "vision_mlp"))
        self.gate_bias_f = constant_param(0.0, (depth, f), spec(None, "vision_mlp"))
        self.up_df = normal_param(keys[3], (depth, d, f), spec(None, "embed", "vision_mlp"))
        self.up_bias_f = constant_param(0.0, (depth, f), spec(None, "vision_mlp"))
        self.down_fd = normal_param(keys[4], (depth, f, d), spec(None, "vision_mlp", "embed"))
        self.down_bias_d = constant_param(0.0, (depth, d), spec(None, None))


class VisionTower(nnx.Module):
    """Patch embedding, blocks and merger."""

    def __init__(self, dims: VisionDims, layout: Layout, key: jax.Array):
        keys = jax.random.split(key, 4)
        spec = layout.spec
        wide = dims.hidden * dims.merge**2
        self.patch_cd = normal_param(keys[0], (dims.patch_width, dims.hidden), spec(None, "embed"))
        self.blocks = VisionBlock(dims, layout, keys[1])
        self.merger_norm_d = constant_param(1.0, (dims.hidden,), spec(None))
        self.merger_up_df = normal_param(keys[2], (wide, wide), spec("embed", "vision_mlp"))
        self.merger_up_bias_f = constant_param(0.0, (wide,), spec("vision_mlp"))
        self.merger_down_fd = normal_param(keys[3], (wide, dims.out), spec("vision_mlp", "embed"))
        self.merger_down_bias_d = constant_param(0.0, (dims.out,), spec(None))


def _block(
    block: VisionBlock, x_bsd: jax.Array, angles: jax.Array, valid_bs: jax.Array, groups: int, layout: Layout
) -> jax.Array:
    """One block; attention within each of ``groups`` equal runs of slots (windows, or 1 for the whole image)."""
    b, s, _ = x_bsd.shape
    spec = layout.spec
    cast = lambda param: param[...].astype(x_bsd.dtype)  # noqa: E731
    y = rms_norm(x_bsd, block.norm1_d[...], _EPS)
    qkv = jnp.einsum("bsd,dcnh->cbsnh", y, cast(block.qkv_d3nh), out_sharding=spec(None, "batch", None, "heads", None))
    qkv = qkv + cast(block.qkv_bias_3nh)[:, None, None]
    split = lambda a: a.reshape(b, groups, s // groups, *a.shape[2:])  # noqa: E731
    q, k, v = split(rotate(qkv[0], angles)), split(rotate(qkv[1], angles)), split(qkv[2])
    out = attend(q, KeyValue(k, v), split(valid_bs)[:, :, None]).reshape(b, s, *q.shape[3:])
    x_bsd = x_bsd + jnp.einsum("bsnh,nhd->bsd", out, cast(block.out_nhd), out_sharding=spec("batch", None, None))
    x_bsd = x_bsd + cast(block.out_bias_d)

    y = rms_norm(x_bsd, block.norm2_d[...], _EPS)
    hidden = spec("batch", None, "vision_mlp")
    gate = jnp.einsum("bsd,df->bsf", y, cast(block.gate_df), out_sharding=hidden) + cast(block.gate_bias_f)
    up = jnp.einsum("bsd,df->bsf", y, cast(block.up_df), out_sharding=hidden) + cast(block.up_bias_f)
    down = jnp.einsum(
        "bsf,fd->bsd", jax.nn.silu(gate) * up, cast(block.down_fd), out_sharding=spec("batch", None, None)
    )
    return x_bsd + down + cast(block.down_bias_d)


def encode_images(
    tower: VisionTower,
    dims: VisionDims,
    layout: Layout,
    patches_bsc: Array,
    patch_hw_bs2: Array,
    valid_bs: Array,
    *,
    dtype: jnp.dtype,
    remat: bool,
) -> jax.Array:
    """Images to embeddings of merged units, in window order.

    Args:
      patches_bsc: float32 normalised pixels, ``s`` a multiple of ``dims.window_slots``.
      patch_hw_bs2: int32 row and column of each patch.
      valid_bs: bool, False in padding slots.

    Returns:
      ``[b, s / merge**2, out]`` in ``dtype``; padding units hold numbers that nothing reads.
    """
    spec = layout.spec
    patches = jnp.asarray(patches_bsc).astype(dtype)
    x_bsd = jnp.einsum(
        "bsc,cd->bsd", patches, tower.patch_cd[...].astype(dtype), out_sharding=spec("batch", None, None)
    )
    angles = axial_angles(patch_hw_bs2, dims.head_width)
    valid_bs = jnp.asarray(valid_bs)
    windows = x_bsd.shape[1] // dims.window_slots
    is_full = np.isin(np.arange(dims.depth), dims.full_attention)

    def body(x: jax.Array, layer: tuple[VisionBlock, jax.Array]) -> tuple[jax.Array, None]:
        block, full = layer
        whole = lambda x: _block(block, x, angles, valid_bs, 1, layout)  # noqa: E731
        windowed = lambda x: _block(block, x, angles, valid_bs, windows, layout)  # noqa: E731
        return jax.lax.cond(full, whole, windowed, x), None

    x_bsd, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x_bsd, (tower.blocks, jnp.asarray(is_full)))

    y = rms_norm(x_bsd, tower.merger_norm_d[...], _EPS)
    b, s, d = y.shape
    # In two steps: a reshape that splits and merges at once has no sharding of its own.
    y = y.reshape(b, s // dims.merge**2, dims.merge**2, d).reshape(b, s // dims.merge**2, dims.merge**2 * d)
    up = jnp.einsum(
        "bsd,df->bsf", y, tower.merger_up_df[...].astype(dtype), out_sharding=spec("batch", None, "vision_mlp")
    )
    up = jax.nn.gelu(up + tower.merger_up_bias_f[...].astype(dtype), approximate=False)
    down = tower.merger_down_fd[...].astype(dtype)
    out = jnp.einsum("bsf,fd->bsd", up, down, out_sharding=spec("batch", None, None))
    return out + tower.merger_down_bias_d[...].astype(dtype)
