"""Attention over long streams in plain XLA, in chunks of queries: scores exist for one chunk at a time.

The forward pass keeps the output and the logarithm of the softmax's denominator; the backward pass recomputes the
scores, as in FlashAttention (Dao et al., arXiv 2205.14135, algorithms 1 and 4), but for all keys of a chunk at once. A
chunk's working set stays in a CPU's caches, while the scores of a whole image of 4,096 patches (400 MB for six heads)
would be written to memory and read again five times.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_MASKED = -1e30
# Number of scores of a chunk on each device: 16 MB in float32.
_CHUNK_SCORES = 4 * 2**20
_LEAST_QUERIES = 16


class Keys(NamedTuple):
    """Keys and values: ``[b, k, g, s, h]`` for queries of the same group, or ``[b, k, p, h]`` for those of all groups.

    Attributes:
      k, v: keys and values, in the layout above.
      mask_bs: bool ``[b, s]`` or ``[b, p]``, which of them are real; None if all are.
    """

    k: jax.Array
    v: jax.Array
    mask_bs: jax.Array | None = None


def chunked_attention(q_bkgqth: jax.Array, own: Keys, shared: Keys | None, first: int | None) -> jax.Array:
    """One softmax over own and shared keys, ``[b, k, g, q, t, h]`` in the dtype of ``q``; softmax in float32.

    Args:
      q_bkgqth: scaled queries of key head ``k``, group ``g`` and query head ``q`` among those that read ``k``.
      own: keys that the queries of one group see.
      shared: further keys, which the queries of all groups see.
      first: query ``t`` sees own keys up to ``first + t`` only; if None, all of them.
    """
    b, k, g, q, t, _ = q_bkgqth.shape
    seen = own.k.shape[3] + (shared.k.shape[2] if shared is not None else 0)
    room = _CHUNK_SCORES * max(jax.sharding.get_abstract_mesh().size, 1)
    chunks = -(-t // max(room // (b * k * g * q * seen), _LEAST_QUERIES))
    size = -(-t // chunks)
    padded = jnp.pad(q_bkgqth, [(0, 0)] * 4 + [(0, chunks * size - t), (0, 0)])
    return _attend(padded, own, shared, first, chunks)[..., :t, :]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q: jax.Array, own: Keys, shared: Keys | None, first: int | None, chunks: int) -> jax.Array:
    return _forward(q, own, shared, first, chunks)[0]


def _fold(x: jax.Array, *shape: int) -> jax.Array:
    """Reshapes all axes but the first two; only the first two are sharded."""
    spec = PartitionSpec(*jax.typeof(x).sharding.spec[:2], *(None,) * len(shape))
    return jnp.reshape(x, (*x.shape[:2], *shape), out_sharding=spec)


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """``[b, k, g, q, t, h]`` to ``[chunks, b, k, g, m, h]``; rows ``m`` of a chunk are its queries, head by head."""
    g, q, t, h = x.shape[2:]
    x = _fold(x, g, q, chunks, t // chunks, h).swapaxes(3, 4)
    return jnp.moveaxis(_fold(x, g, chunks, q * (t // chunks), h), 3, 0)


def _join(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of ``_split``."""
    chunks, _, _, g, m, h = x.shape
    x = _fold(jnp.moveaxis(x, 0, 3), g, chunks, heads, m // heads, h).swapaxes(3, 4)
    return _fold(x, g, heads, chunks * (m // heads), h)


def _all_groups(x: jax.Array) -> jax.Array:
    """``[b, k, g, m, h]`` as one matrix per head, for the shared keys: products of plain matrices need no copies."""
    return _fold(x, x.shape[2] * x.shape[3], x.shape[4])


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    """The inverse of ``_all_groups``."""
    return _fold(x, groups, x.shape[2] // groups, x.shape[3])


def _masked(scores: jax.Array, mask_bs: jax.Array | None) -> jax.Array:
    if mask_bs is None:
        return scores
    return jnp.where(jnp.expand_dims(mask_bs, range(1, scores.ndim - 1)), scores, _MASKED)


def _own_scores(q: jax.Array, last: jax.Array | None, own: Keys) -> jax.Array:
    """Masked float32 scores ``[b, k, g, m, s]`` of a chunk whose rows see the keys up to ``last``."""
    scores = jnp.einsum("bkgmh,bkgsh->bkgms", q, own.k, preferred_element_type=jnp.float32)
    if last is not None:
        scores = jnp.where(jnp.arange(scores.shape[-1]) <= last[:, None], scores, _MASKED)
    return _masked(scores, own.mask_bs)


def _shared_scores(q: jax.Array, shared: Keys) -> jax.Array:
    """Masked float32 scores ``[b, k, g * m, p]`` over the shared keys."""
    scores = jnp.einsum("bkmh,bkph->bkmp", _all_groups(q), shared.k, preferred_element_type=jnp.float32)
    return _masked(scores, shared.mask_bs)


_Residuals = tuple[jax.Array, Keys, Keys | None, jax.Array, jax.Array]


def _last_seen(first: int | None, heads: int, length: int, chunks: int) -> jax.Array | None:
    """The last own key that each row of each chunk sees, ``[chunks, m]``."""
    if first is None:
        return None
    size = length // chunks
    return first + size * jnp.arange(chunks)[:, None] + jnp.tile(jnp.arange(size), heads)


def _forward(
    q: jax.Array, own: Keys, shared: Keys | None, first: int | None, chunks: int
) -> tuple[jax.Array, _Residuals]:
    groups, heads = q.shape[2:4]

    def one(part: tuple[jax.Array | None, jax.Array]) -> tuple[jax.Array, jax.Array]:
        last, q = part
        own_scores = _own_scores(q, last, own)
        top = own_scores.max(-1, keepdims=True)
        if shared is not None:
            shared_scores = _shared_scores(q, shared)
            top = jnp.maximum(top, _by_group(shared_scores.max(-1, keepdims=True), groups))
        weights = jnp.exp(own_scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("bkgms,bkgsh->bkgmh", weights, own.v)
        if shared is not None:
            weights = jnp.exp(shared_scores - _all_groups(top))
            total += _by_group(weights.sum(-1, keepdims=True), groups)
            out += _by_group(_product("bkmp,bkph->bkmh", weights, shared.v), groups)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    out, log_total = jax.lax.map(one, (_last_seen(first, heads, q.shape[4], chunks), _split(q, chunks)))
    return _join(out, heads), (q, own, shared, out, log_total)


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum with float32 result, after casting the float32 operand to the dtype of the other one."""
    narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(subscripts, left.astype(narrow), right.astype(narrow), preferred_element_type=jnp.float32)


_Sums = tuple[jax.Array, ...]


def _backward(
    first: int | None, chunks: int, saved: _Residuals, gradient: jax.Array
) -> tuple[jax.Array, Keys, Keys | None]:
    q, own, shared, out, log_total = saved
    groups, heads = q.shape[2:4]

    def one(
        sums: tuple[_Sums, _Sums | None],
        part: tuple[jax.Array | None, jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[tuple[_Sums, _Sums | None], jax.Array]:
        last, q, gradient, out, log_total = part
        # The derivative of softmax: ds = p * (dp - mean), with mean = sum(p * dp) = sum(out * d_out).
        mean = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1, keepdims=True)
        own_sums, shared_sums = sums
        weights = jnp.exp(_own_scores(q, last, own) - log_total)
        ds = weights * (_product("bkgmh,bkgsh->bkgms", gradient, own.v) - mean)
        dq = _product("bkgms,bkgsh->bkgmh", ds, own.k)
        own_sums = (
            own_sums[0] + _product("bkgmh,bkgms->bkghs", q, ds),
            own_sums[1] + _product("bkgmh,bkgms->bkghs", gradient, weights),
        )
        if shared is not None:
            assert shared_sums is not None
            every_q, every_gradient = _all_groups(q), _all_groups(gradient)
            weights = jnp.exp(_shared_scores(q, shared) - _all_groups(log_total))
            ds = weights * (_product("bkmh,bkph->bkmp", every_gradient, shared.v) - _all_groups(mean))
            dq += _by_group(_product("bkmp,bkph->bkmh", ds, shared.k), groups)
            shared_sums = (
                shared_sums[0] + _product("bkmh,bkmp->bkhp", every_q, ds),
                shared_sums[1] + _product("bkmh,bkmp->bkhp", every_gradient, weights),
            )
        return (own_sums, shared_sums), dq.astype(q.dtype)

    # Summed with the head width as leading axis: XLA's CPU backend is three times as fast with a narrow left matrix.
    nothing = lambda keys: tuple(jnp.zeros_like(x.mT, jnp.float32) for x in (keys.k, keys.v))  # noqa: E731
    zeros = (nothing(own), None if shared is None else nothing(shared))
    last = _last_seen(first, heads, q.shape[4], chunks)
    parts = (last, _split(q, chunks), _split(gradient, chunks), out, log_total)
    (own_sums, shared_sums), dq = jax.lax.scan(one, zeros, parts)
    found = lambda sums, keys: Keys(*(x.mT.astype(keys.k.dtype) for x in sums))  # noqa: E731
    return _join(dq, heads), found(own_sums, own), None if shared is None else found(shared_sums, shared)


_attend.defvjp(_forward, _backward)
