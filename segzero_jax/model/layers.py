"""Linear layers, norms, rotary embeddings and parameter creation, shared by the decoder and the vision tower."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from segzero_jax.types import Array

T = TypeVar("T")


def normal_param(key: jax.Array, shape: tuple[int, ...], spec: PartitionSpec, scale: float = 0.02) -> nnx.Param:
    """A float32 parameter drawn from N(0, scale²), created sharded."""
    return nnx.Param(scale * jax.random.normal(key, shape, jnp.float32, out_sharding=spec))


def constant_param(value: float, shape: tuple[int, ...], spec: PartitionSpec) -> nnx.Param:
    """A float32 parameter of one value, created sharded."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec))


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def linear(
    subscripts: str,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    out_sharding: PartitionSpec,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """``einsum(subscripts, x, weight) + bias``, computed in the dtype of ``x``.

    The gradients of weight and bias stay float32 from the matrix product through the sum over devices, where plain
    differentiation would round every device's share to the dtype of ``x`` first.

    Args:
      subscripts: as for ``einsum``, without an ellipsis; every letter occurs in two of the three arrays.
      weight: float32 or already in the dtype of ``x``.
      bias: its axes are those of ``weight`` that ``x`` does not have, in that order.
      out_sharding: sharding of the result.
      out_dtype: dtype of the result, by default that of ``x``.
    """
    y = jnp.einsum(
        subscripts, x, weight.astype(x.dtype), out_sharding=out_sharding, preferred_element_type=out_dtype or x.dtype
    )
    return y if bias is None else y + _spread(subscripts, bias, out_sharding).astype(y.dtype)


def _letters(subscripts: str) -> tuple[str, str, str, str]:
    """Letters of input, weight, result and bias."""
    operands, out = subscripts.split("->")
    x, weight = operands.split(",")
    return x, weight, out, "".join(letter for letter in weight if letter not in x)


def _spread(subscripts: str, bias: jax.Array, out_sharding: PartitionSpec) -> jax.Array:
    """The bias with an axis of size one for every other axis of the result, sharded like the result."""
    _, _, out, own = _letters(subscripts)
    assert [letter for letter in out if letter in own] == list(own), "bias axes keep their order"
    parts = zip(out, [*out_sharding, *[None] * len(out)], strict=False)
    bias = jax.sharding.reshard(bias, PartitionSpec(*(part for letter, part in parts if letter in own)))
    return jnp.expand_dims(bias, [axis for axis, letter in enumerate(out) if letter not in own])


def _linear_forward(
    subscripts: str,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    out_sharding: PartitionSpec,
    out_dtype: jnp.dtype | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return linear(subscripts, x, weight, bias, out_sharding, out_dtype), (x, weight, bias)


def _in_one_sum(
    x_letters: str, x: jax.Array, out: str, gradient: jax.Array
) -> tuple[tuple[str, jax.Array], tuple[str, jax.Array]]:
    """Merges the leading axes shared by both arrays, over which a weight's gradient sums, if each has one other axis.

    XLA's CPU backend multiplies such matrices as they are; to sum over several axes it transposes one of them first.
    """
    rows = next(axis for axis, (ours, theirs) in enumerate(zip(x_letters, out, strict=False)) if ours != theirs)
    if rows < 2 or {len(x_letters), len(out)} != {rows + 1}:
        return (x_letters, x), (out, gradient)

    def merge(letters: str, a: jax.Array) -> tuple[str, jax.Array]:
        first, *others, last = jax.typeof(a).sharding.spec
        assert not any(others), f"{letters}: {first, *others, last}: expected rows that only the first axis divides"
        return letters[0] + letters[-1], jnp.reshape(a, (-1, a.shape[-1]), out_sharding=PartitionSpec(first, last))

    return merge(x_letters, x), merge(out, gradient)


def _linear_backward(
    subscripts: str,
    out_sharding: PartitionSpec,
    out_dtype: jnp.dtype | None,
    saved: tuple[jax.Array, jax.Array, jax.Array | None],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, weight, bias = saved
    x_letters, w_letters, out, own = _letters(subscripts)
    narrow = gradient.astype(x.dtype)
    dx = jnp.einsum(
        f"{out},{w_letters}->{x_letters}",
        narrow,
        weight.astype(x.dtype),
        out_sharding=jax.typeof(x).sharding.spec,
        preferred_element_type=x.dtype,
    )
    (x_letters, x), (out_letters, narrow) = _in_one_sum(x_letters, x, out, narrow)
    dw = jnp.einsum(
        f"{x_letters},{out_letters}->{w_letters}",
        x,
        narrow,
        out_sharding=jax.typeof(weight).sharding.spec,
        preferred_element_type=weight.dtype,
    )
    if bias is None:
        return dx, dw, None
    others = tuple(axis for axis, letter in enumerate(out) if letter not in own)
    db = gradient.sum(others, dtype=jnp.float32).astype(bias.dtype)
    return dx, dw, jax.sharding.reshard(db, jax.typeof(bias).sharding.spec)


linear.defvjp(_linear_forward, _linear_backward)


def recomputed(f: Callable[..., T]) -> Callable[..., T]:
    """``f``, rematerialised: its intermediates are recomputed in the backward pass instead of being stored.

    For norms and gates before matrix products: the inputs of the products take as much memory as everything else that a
    block stores, and recomputing them costs only one pass over them. The products themselves are not repeated, since no
    gradient reads their results.
    """
    # A loop over blocks leaves nothing for CSE to share; in unrolled blocks XLA may keep intermediates.
    return jax.checkpoint(f, prevent_cse=False)


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis: statistics in float32, the scale in ``x``'s dtype, as in Qwen2.5-VL."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    # The product of two narrow numbers, computed in float32 so that the scale's gradient is summed in float32. The
    # scale is rounded by adding a constant (stop_gradient), so that this sum is not rounded.
    wide_d = scale_d.astype(jnp.float32)
    narrow_d = wide_d + jax.lax.stop_gradient(scale_d.astype(x.dtype).astype(jnp.float32) - wide_d)
    return (normed.astype(x.dtype).astype(jnp.float32) * narrow_d).astype(x.dtype)


def mrope_angles(positions_b3t: Array, sections: tuple[int, int, int], theta: float) -> jax.Array:
    """Rotation angles of multimodal RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1): [b, t, sum(sections)], float32.

    The frequencies are split into three runs: the first ``sections[0]`` rotate with the temporal position, the next
    with the row, the last with the column.
    """
    half = sum(sections)
    frequencies = theta ** -(np.arange(half, dtype=np.float32) / np.float32(half))
    runs = np.split(frequencies, np.cumsum(sections)[:-1])
    positions = jnp.asarray(positions_b3t).astype(jnp.float32)
    # Not a matrix product: a TPU would round positions from 256 on to bfloat16.
    return jnp.concatenate([positions[:, axis, :, None] * run for axis, run in enumerate(runs)], axis=-1)


def axial_angles(patch_hw_bs2: Array, head_width: int, theta: float = 10000.0) -> jax.Array:
    """Rotation angles of the vision tower, [b, s, h / 2]: half of them rotate with the row, half with the column."""
    quarter = head_width // 4
    frequencies = theta ** -(np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    hw = jnp.asarray(patch_hw_bs2).astype(jnp.float32)
    return jnp.concatenate([hw[..., :1] * frequencies, hw[..., 1:] * frequencies], axis=-1)


def rotate(x_btnh: jax.Array, angles_bta: jax.Array) -> jax.Array:
    """Applies rotary embeddings to the two halves of the head width, in float32.

    Args:
      x_btnh: queries or keys.
      angles_bta: ``a`` is h / 2.
    """
    cos, sin = jnp.cos(angles_bta)[:, :, None], jnp.sin(angles_bta)[:, :, None]
    left, right = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x_btnh.dtype)
