"""Attention over long streams in plain XLA, in chunks of queries: scores exist for one chunk at a time.

Forward keeps the output and the logarithm of the softmax's denominator; backward computes the scores once more, as in
FlashAttention (Dao et al., arXiv 2205.14135, algorithms 1 and 4), but for all keys of a chunk at once. What a chunk
needs stays in the caches of a CPU, where scores of a whole image of 4,096 patches (400 MB for six heads) are written
to memory and read again five times.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_MASKED = -1e30
# Scores of a chunk on each device: 16 MB in float32.
_CHUNK_SCORES = 4 * 2**20
_LEAST_QUERIES = 16


class Keys(NamedTuple):
    """Keys and values ``[b, k, g, s, h]`` that queries of the same group see, and those ``[b, k, p, h]`` that all see.

    Attributes:
      own_k, own_v: a group's own.
      own_mask_bs: bool, which of them are real; None where all are.
      prompt_k, prompt_v, prompt_mask_bp: the shared ones, None where there are none.
    """

    own_k: jax.Array
    own_v: jax.Array
    own_mask_bs: jax.Array | None
    prompt_k: jax.Array | None = None
    prompt_v: jax.Array | None = None
    prompt_mask_bp: jax.Array | None = None


def chunked_attention(q_bkgqth: jax.Array, keys: Keys, causal: bool) -> jax.Array:
    """One softmax over own and shared keys, ``[b, k, g, q, t, h]`` in the dtype of ``q``; softmax in float32.

    Args:
      q_bkgqth: queries, scaled: of key head ``k``, group ``g`` and query head ``q`` among those that read ``k``.
      keys: what they see.
      causal: query ``t`` sees its own keys up to ``t`` only.
    """
    b, k, g, q, t, _ = q_bkgqth.shape
    seen = keys.own_k.shape[3] + (0 if keys.prompt_k is None else keys.prompt_k.shape[2])
    room = _CHUNK_SCORES * max(jax.sharding.get_abstract_mesh().size, 1)
    chunks = -(-t // max(room // (b * k * g * q * seen), _LEAST_QUERIES))
    size = -(-t // chunks)
    padded = jnp.pad(q_bkgqth, [(0, 0)] * 4 + [(0, chunks * size - t), (0, 0)])
    return _attend(padded, keys, causal, chunks)[..., :t, :]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(q: jax.Array, keys: Keys, causal: bool, chunks: int) -> jax.Array:
    return _forward(q, keys, causal, chunks)[0]


def _fold(x: jax.Array, *shape: int) -> jax.Array:
    """A reshape of all axes but the first two, which are the ones that a mesh divides."""
    spec = PartitionSpec(*jax.typeof(x).sharding.spec[:2], *(None,) * len(shape))
    return jnp.reshape(x, (*x.shape[:2], *shape), out_sharding=spec)


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """``[b, k, g, q, t, h]`` to ``[chunks, b, k, g, m, h]``: rows ``m`` of a chunk are its queries, head by head."""
    g, q, t, h = x.shape[2:]
    x = _fold(x, g, q, chunks, t // chunks, h).swapaxes(3, 4)
    return jnp.moveaxis(_fold(x, g, chunks, q * (t // chunks), h), 3, 0)


def _join(x: jax.Array, heads: int) -> jax.Array:
    """``_split`` undone."""
    chunks, _, _, g, m, h = x.shape
    x = _fold(jnp.moveaxis(x, 0, 3), g, chunks, heads, m // heads, h).swapaxes(3, 4)
    return _fold(x, g, heads, chunks * (m // heads), h)


def _all_groups(x: jax.Array) -> jax.Array:
    """``[b, k, g, m, h]`` as one matrix a head, for what all groups share: products of plain matrices copy nothing."""
    return _fold(x, x.shape[2] * x.shape[3], x.shape[4])


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    """``_all_groups`` undone."""
    return _fold(x, groups, x.shape[2] // groups, x.shape[3])


def _scores(q: jax.Array, places: jax.Array, keys: Keys, causal: bool) -> tuple[jax.Array, jax.Array | None]:
    """Masked float32 scores of a chunk: over own keys ``[b, k, g, m, s]``, and over shared ones ``[b, k, g * m, p]``.

    ``places`` are the positions of its rows.
    """
    own = jnp.einsum("bkgmh,bkgsh->bkgms", q, keys.own_k, preferred_element_type=jnp.float32)
    if causal:
        own = jnp.where(jnp.arange(own.shape[-1]) <= places[:, None], own, _MASKED)
    if keys.own_mask_bs is not None:
        own = jnp.where(keys.own_mask_bs[:, None, None, None], own, _MASKED)
    if keys.prompt_k is None:
        return own, None
    assert keys.prompt_mask_bp is not None
    shared = jnp.einsum("bkmh,bkph->bkmp", _all_groups(q), keys.prompt_k, preferred_element_type=jnp.float32)
    return own, jnp.where(keys.prompt_mask_bp[:, None, None], shared, _MASKED)


_Residuals = tuple[jax.Array, Keys, jax.Array, jax.Array]


def _places(heads: int, length: int, chunks: int) -> jax.Array:
    """Positions of the rows of each chunk, ``[chunks, m]``."""
    size = length // chunks
    return size * jnp.arange(chunks)[:, None] + jnp.tile(jnp.arange(size), heads)


def _forward(q: jax.Array, keys: Keys, causal: bool, chunks: int) -> tuple[jax.Array, _Residuals]:
    groups, heads = q.shape[2:4]

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        places, q = part
        own, shared = _scores(q, places, keys, causal)
        top = own.max(-1, keepdims=True)
        if shared is not None:
            top = jnp.maximum(top, _by_group(shared.max(-1, keepdims=True), groups))
        weights = jnp.exp(own - top)
        total = weights.sum(-1, keepdims=True)
        out = _product("bkgms,bkgsh->bkgmh", weights, keys.own_v)
        if shared is not None:
            assert keys.prompt_v is not None
            weights = jnp.exp(shared - _all_groups(top))
            total += _by_group(weights.sum(-1, keepdims=True), groups)
            out += _by_group(_product("bkmp,bkph->bkmh", weights, keys.prompt_v), groups)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    out, log_total = jax.lax.map(one, (_places(heads, q.shape[4], chunks), _split(q, chunks)))
    return _join(out, heads), (q, keys, out, log_total)


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _backward(causal: bool, chunks: int, saved: _Residuals, gradient: jax.Array) -> tuple[jax.Array, Keys]:
    q, keys, out, log_total = saved
    groups, heads = q.shape[2:4]
    floats = (keys.own_k, keys.own_v, keys.prompt_k, keys.prompt_v)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), floats)

    def one(total: tuple, part: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        places, q, gradient, out, log_total = part
        own, shared = _scores(q, places, keys, causal)
        # The derivative of a softmax: its weights times what each score alone would change, less their mean.
        mean = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1, keepdims=True)
        own_k, own_v, prompt_k, prompt_v = total
        weights = jnp.exp(own - log_total)
        slope = _product("bkgmh,bkgsh->bkgms", gradient, keys.own_v)
        ds = weights * (slope - mean)
        dq = _product("bkgms,bkgsh->bkgmh", ds, keys.own_k)
        own_k += _product("bkgms,bkgmh->bkgsh", ds, q)
        own_v += _product("bkgms,bkgmh->bkgsh", weights, gradient)
        if shared is not None:
            every_q, every_gradient = _all_groups(q), _all_groups(gradient)
            weights = jnp.exp(shared - _all_groups(log_total))
            slope = _product("bkmh,bkph->bkmp", every_gradient, keys.prompt_v)
            ds = weights * (slope - _all_groups(mean))
            dq += _by_group(_product("bkmp,bkph->bkmh", ds, keys.prompt_k), groups)
            prompt_k += _product("bkmp,bkmh->bkph", ds, every_q)
            prompt_v += _product("bkmp,bkmh->bkph", weights, every_gradient)
        return (own_k, own_v, prompt_k, prompt_v), dq.astype(q.dtype)

    parts = (_places(heads, q.shape[4], chunks), _split(q, chunks), _split(gradient, chunks), out, log_total)
    found, dq = jax.lax.scan(one, zeros, parts)
    own_k, own_v, prompt_k, prompt_v = jax.tree.map(lambda x, like: x.astype(like.dtype), found, floats)
    return _join(dq, heads), Keys(own_k, own_v, None, prompt_k, prompt_v, None)


_attend.defvjp(_forward, _backward)
