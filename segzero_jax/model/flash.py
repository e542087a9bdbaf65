"""cuDNN's flash attention (``jax.nn.dot_product_attention``) over prefix groups and over images, on NVIDIA GPUs.

For bfloat16 and float16 only, as in cuDNN. Its masks are arrays added to the scores, so they cost memory and time; a
plain causal mask costs none. A query that sees no key gets NaN gradients, which spread to sums even with zero weight.
Such queries are all padding; they are made to see every key instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

# cuDNN needs head widths that are multiples of this.
_WIDTHS = 8
# Added to the score of a masked key.
_UNSEEN = -3e3


def flash_group(
    q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, prompt_mask_bp: jax.Array, length: int, spec: PartitionSpec
) -> jax.Array:
    """Attention of the stream ``[prompt | r1 | ... | rG]`` to itself, each device on its own rows and heads.

    The prompt attends to itself causally. Every response is a separate sequence that also sees the prompt; the prompt's
    keys are repeated for it, which is cheap since there are few key heads.

    Args:
      q_btnh, k_btkh, v_btkh: queries, keys and values, partitioned by ``spec``; ``n`` is a multiple of ``k`` on every
        device.
      prompt_mask_bp: bool, which prompt tokens are real. Partitioned like the batch.
      length: tokens of a response.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``q``. Rows of padding are meaningless.
    """
    p = prompt_mask_bp.shape[1]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, real_bp: jax.Array) -> jax.Array:
        out = _attend(q[:, :p], k[:, :p], v[:, :p], causal=True)
        if q.shape[1] == p:
            return out
        b, groups = q.shape[0], (q.shape[1] - p) // length
        alone = lambda a: a[:, p:].reshape(b * groups, length, *a.shape[2:])  # noqa: E731
        repeated = lambda a: jnp.repeat(a[:, :p], groups, axis=0)  # noqa: E731
        behind = lambda a: jnp.concatenate([repeated(a), alone(a)], axis=1)  # noqa: E731
        own = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (b * groups, length, length))
        prompt = jnp.broadcast_to(repeated(real_bp)[:, None], (b * groups, length, p))
        responses = _attend(alone(q), behind(k), behind(v), mask_bts=jnp.concatenate([prompt, own], axis=2))
        return jnp.concatenate([out, responses.reshape(b, groups * length, *q.shape[2:])], axis=1)

    return _on_each(local, spec, q_btnh, k_btkh, v_btkh, prompt_mask_bp)


def flash_image(
    q_bsnh: jax.Array, k_bsnh: jax.Array, v_bsnh: jax.Array, valid_bs: jax.Array, spec: PartitionSpec
) -> jax.Array:
    """Attention among all valid patches of an image, ``[b, s, n, h]``; arguments as in ``flash_group``.

    Instead of a mask, heads get extra width, where invalid keys hold a value that lowers their score for all queries.
    """
    width = q_bsnh.shape[-1]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, valid_bs: jax.Array) -> jax.Array:
        def widen(a: jax.Array, more: jax.Array | float) -> jax.Array:
            more = jnp.broadcast_to(more, (*a.shape[:3], _WIDTHS))
            return jnp.concatenate([a, more.astype(a.dtype)], axis=-1)

        less = jnp.where(valid_bs, 0, _UNSEEN * width**0.5 / _WIDTHS)[..., None, None]
        return _attend(widen(q, 1), widen(k, less), widen(v, 0), scale=width**-0.5)[..., :width]

    return _on_each(local, spec, q_bsnh, k_bsnh, v_bsnh, valid_bs)


def flash_windows(
    q_bsnh: jax.Array, k_bsnh: jax.Array, v_bsnh: jax.Array, seen_bwss: jax.Array, spec: PartitionSpec
) -> jax.Array:
    """Attention within runs of slots, ``[b, s, n, h]``; ``seen_bwss`` masks what a patch sees of its run."""

    def local(q: jax.Array, k: jax.Array, v: jax.Array, seen_bwss: jax.Array) -> jax.Array:
        b, w, s = seen_bwss.shape[:3]
        alone = lambda a: a.reshape(b * w, s, *a.shape[2:])  # noqa: E731
        return _attend(alone(q), alone(k), alone(v), mask_bts=seen_bwss.reshape(b * w, s, s)).reshape(q.shape)

    return _on_each(local, spec, q_bsnh, k_bsnh, v_bsnh, seen_bwss)


def _on_each(
    local: Callable[..., jax.Array], spec: PartitionSpec, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    rows = PartitionSpec(spec[0], *(None,) * (mask.ndim - 1))
    mask = jax.sharding.reshard(mask, rows)
    # check_vma=False: cuDNN's calls do not declare over which axes their results vary.
    return jax.shard_map(local, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)(q, k, v, mask)


def _attend(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    mask_bts: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> jax.Array:
    tokens = q_btnh.shape[1]
    if mask_bts is not None:
        # With a mask, cuDNN needs even lengths.
        fill = [(0, size % 2) for size in mask_bts.shape[1:]]
        q_btnh = jnp.pad(q_btnh, ((0, 0), fill[0], (0, 0), (0, 0)))
        k_bskh, v_bskh = (jnp.pad(a, ((0, 0), fill[1], (0, 0), (0, 0))) for a in (k_bskh, v_bskh))
        mask_bts = jnp.pad(mask_bts, ((0, 0), *fill))
        mask_bts = (mask_bts | ~mask_bts.any(-1, keepdims=True))[:, None]
    out = jax.nn.dot_product_attention(
        q_btnh, k_bskh, v_bskh, mask=mask_bts, is_causal=causal, scale=scale, implementation="cudnn"
    )
    return out[:, :tokens]
