"""The vision tower of Qwen2.5-VL: window and full attention, 2-D rotary embeddings, SwiGLU, 2x2 merger.

Patches arrive in window order, in runs as large as a full window (laid out by ``patches.window_order``), so window
attention is a batch of small squares.
Reference: transformers, ``models/qwen2_5_vl/modeling_qwen2_5_vl.py``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from segzero_jax.mesh import Layout
from segzero_jax.model.attention import Kernel, KeyValue, attend_image, attend_windows
from segzero_jax.model.blocks import run_blocks
from segzero_jax.model.dims import VisionDims
from segzero_jax.model.layers import axial_angles, constant_param, linear, normal_param, recomputed, rms_norm, rotate
from segzero_jax.types import Array

_EPS = 1e-6
# cuBLAS needs rows that are multiples of 16 bytes, on each of up to four devices that shard a matrix. The MLP of the
# released towers has 3,420 units, for which XLA would pad activations at every product.
_UNITS = 32


class VisionBlocks(nnx.Module):
    """All blocks of the tower, stacked on a leading layer axis."""

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
        self.blocks = VisionBlocks(dims, layout, keys[1])
        self.merger_norm_d = constant_param(1.0, (dims.hidden,), spec(None))
        self.merger_up_df = normal_param(keys[2], (wide, wide), spec("embed", "vision_mlp"))
        self.merger_up_bias_f = constant_param(0.0, (wide,), spec("vision_mlp"))
        self.merger_down_fd = normal_param(keys[3], (wide, dims.out), spec("vision_mlp", "embed"))
        self.merger_down_bias_d = constant_param(0.0, (dims.out,), spec(None))


def _block(
    block: VisionBlocks,
    x_bsd: jax.Array,
    angles: jax.Array,
    valid_bs: jax.Array,
    seen_bwss: jax.Array | None,
    layout: Layout,
    kernel: Kernel,
) -> jax.Array:
    """One block, with attention within runs of slots, masked by ``seen_bwss``, or if None, among all valid slots."""
    spec = layout.spec
    rows, hidden = spec("batch", None, None), spec("batch", None, "vision_mlp")
    heads = spec("batch", None, "heads", None)
    more = (0, -block.down_fd.shape[0] % _UNITS if kernel == "cudnn" else 0)  # Padding units, whose results are zeros.
    # Axis "c" is query, key, value: cuBLAS writes those of a token side by side; splitting them first would be a copy.
    axis, letters = (2, "bscnh") if kernel == "cudnn" else (0, "cbsnh")

    @recomputed
    def project(x_bsd: jax.Array, block: VisionBlocks) -> jax.Array:
        y = rms_norm(x_bsd, block.norm1_d[...], _EPS)
        out = PartitionSpec(*heads[:axis], None, *heads[axis:])
        return linear(f"bsd,dcnh->{letters}", y, block.qkv_d3nh[...], block.qkv_bias_3nh[...], out)

    @recomputed
    def widen(x_bsd: jax.Array, block: VisionBlocks) -> tuple[jax.Array, jax.Array]:
        y = rms_norm(x_bsd, block.norm2_d[...], _EPS)
        gate_df, up_df = (jnp.pad(weight[...], ((0, 0), more)) for weight in (block.gate_df, block.up_df))
        gate_bias_f, up_bias_f = (jnp.pad(bias[...], more) for bias in (block.gate_bias_f, block.up_bias_f))
        gate = linear("bsd,df->bsf", y, gate_df, gate_bias_f, hidden)
        return gate, linear("bsd,df->bsf", y, up_df, up_bias_f, hidden)

    @recomputed
    def narrow(gate_bsf: jax.Array, up_bsf: jax.Array, block: VisionBlocks) -> jax.Array:
        gated = jax.nn.silu(gate_bsf) * up_bsf
        down_fd = jnp.pad(block.down_fd[...], (more, (0, 0)))
        return linear("bsf,fd->bsd", gated, down_fd, block.down_bias_d[...], rows)

    qkv = project(x_bsd, block)
    q, k, v = (jax.lax.index_in_dim(qkv, part, axis, keepdims=False) for part in range(3))
    q, k = rotate(q, angles), rotate(k, angles)
    if seen_bwss is not None:
        out = attend_windows(q, KeyValue(k, v), seen_bwss, kernel, heads)
    else:
        out = attend_image(q, KeyValue(k, v), valid_bs, kernel, heads)
    x_bsd = x_bsd + linear("bsnh,nhd->bsd", out, block.out_nhd[...], block.out_bias_d[...], rows)
    return x_bsd + narrow(*widen(x_bsd, block), block)


def _same_window(patch_hw_bs2: jax.Array, valid_bs: jax.Array, dims: VisionDims) -> jax.Array:
    """The mask of the valid patches of its run that share a patch's window, bool ``[b, w, s, s]``."""
    b = patch_hw_bs2.shape[0]
    split = lambda a: a.reshape(b, -1, dims.window_slots, *a.shape[2:])  # noqa: E731
    window = split(patch_hw_bs2) // dims.window_side
    return (window[:, :, :, None] == window[:, :, None]).all(-1) & split(valid_bs)[:, :, None]


def encode_images(
    tower: VisionTower,
    dims: VisionDims,
    layout: Layout,
    patches_bsc: Array,
    patch_hw_bs2: Array,
    valid_bs: Array,
    *,
    dtype: jnp.dtype,
    kernel: Kernel,
    remat: bool,
    one_loop: bool,
    written_out: bool,
) -> jax.Array:
    """Encodes images to embeddings of merged units, in window order.

    Args:
      patches_bsc: float32 normalised pixels, ``s`` a multiple of ``dims.window_slots``.
      patch_hw_bs2: int32 row and column of each patch.
      valid_bs: bool, False in empty slots.
      one_loop: loop over strides of blocks, with the loop over windowed blocks inside: a smaller program. If blocks
        save residuals for a backward pass, the outer loop would copy those of the inner one.

    Returns:
      ``[b, s / merge**2, out]`` in ``dtype``; empty units are meaningless.
    """
    spec = layout.spec
    rows = spec("batch", None, None)
    x_bsd = linear("bsc,cd->bsd", jnp.asarray(patches_bsc).astype(dtype), tower.patch_cd[...], None, rows)
    angles = axial_angles(patch_hw_bs2, dims.head_width)
    valid_bs = jnp.asarray(valid_bs)
    seen_bwss = _same_window(jnp.asarray(patch_hw_bs2), valid_bs, dims)
    # Every stride-th block attends over the whole image.
    stride = dims.full_attention[0] + 1

    def step(seen: jax.Array | None) -> Callable[[jax.Array, VisionBlocks], jax.Array]:
        body = lambda x, block: _block(block, x, angles, valid_bs, seen, layout, kernel)  # noqa: E731
        return jax.checkpoint(body) if remat else body

    def run_stride(x_bsd: jax.Array, blocks: VisionBlocks) -> jax.Array:
        windows, whole = (jax.tree.map(lambda a, at=at: a[at], blocks) for at in (slice(stride - 1), -1))
        return step(None)(run_blocks(step(seen_bwss), x_bsd, windows, written_out), whole)

    if one_loop:
        strides = jax.tree.map(lambda a: a.reshape(-1, stride, *a.shape[1:]), tower.blocks)
        x_bsd = run_blocks(run_stride, x_bsd, strides, False)
    else:
        for first in range(0, dims.depth, stride):
            x_bsd = run_stride(x_bsd, jax.tree.map(lambda a, at=first: a[at : at + stride], tower.blocks))

    y = rms_norm(x_bsd, tower.merger_norm_d[...], _EPS)
    b, s, d = y.shape
    # In two steps: a reshape that both splits and merges axes has no unambiguous sharding.
    y = y.reshape(b, s // dims.merge**2, dims.merge**2, d).reshape(b, s // dims.merge**2, dims.merge**2 * d)
    hidden = spec("batch", None, "vision_mlp")
    up = linear("bsd,df->bsf", y, tower.merger_up_df[...], tower.merger_up_bias_f[...], hidden)
    up = jax.nn.gelu(up, approximate=False)
    return linear("bsf,fd->bsd", up, tower.merger_down_fd[...], tower.merger_down_bias_d[...], rows)
