"""The policy's distribution over tokens: one definition for sampling, reference and update.

Logits are divided by the sampling temperature, and the visual special tokens are masked: a sampled ``<|image_pad|>`` is
not an image. Full logits of a batch never exist: they are computed in chunks of tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from segzero_jax.model.policy import ForwardConfig, Policy, head_weights
from segzero_jax.types import Array

_IMPOSSIBLE = -1e30
# A chunk has at most _TOKENS tokens on each device, or the tokens of all responses at _POSITIONS positions if those are
# more. A device holds the logits of one chunk.
_TOKENS, _POSITIONS = 1024, 32


def sampling_logits(
    raw: jax.Array, temperature: float, banned_ids: tuple[int, ...], first_id: int | jax.Array = 0
) -> jax.Array:
    """Logits of the sampling distribution, float32 ``[..., v]``, for the ``v`` tokens from ``first_id`` on."""
    vocabulary = first_id + jax.lax.broadcasted_iota(jnp.int32, (raw.shape[-1],), 0)
    banned = jnp.isin(vocabulary, jnp.asarray(banned_ids, jnp.int32))
    banned = jax.sharding.reshard(banned, PartitionSpec(jax.typeof(raw).sharding.spec[-1]))
    return jnp.where(banned, _IMPOSSIBLE, raw / temperature)


def pick(values_v: jax.Array, tokens: jax.Array) -> jax.Array:
    """``values[..., token]`` by comparison and sum, which does not gather a sharded vocabulary."""
    iota = jax.lax.broadcasted_iota(jnp.int32, values_v.shape, values_v.ndim - 1)
    iota = jax.sharding.reshard(iota, jax.typeof(values_v).sharding.spec)
    return jnp.where(iota == tokens[..., None], values_v, 0).sum(-1)


def log_probability(scaled_v: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of one token each, from logits of the whole vocabulary, in nats.

    Computed relative to the top logit, as in ``response_logps``, so that both are rounded the same.
    """
    below = scaled_v - scaled_v.max(-1, keepdims=True)
    return pick(below, tokens) - jnp.log(jnp.exp(below).sum(-1))


def response_logps(
    policy: Policy,
    hidden_bgrd: jax.Array,
    tokens_bgr: Array,
    fwd: ForwardConfig,
    temperature: float,
    banned_ids: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every response token, and entropy of the distribution it was sampled from.

    Each device has its rows and its part of the vocabulary. The head is resharded once, before the chunks, and its
    gradient is reduced once, after them.

    Args:
      hidden_bgrd: states that predict the tokens (``group_hidden``).
      tokens_bgr: int32.

    Returns:
      float32 ``[b, g, r]`` each, in nats. The backward pass recomputes the logits, so that memory holds one chunk.
    """
    layout = fwd.layout
    rows, parts = layout.over("head_batch"), layout.over("vocab")
    head_vd = jax.sharding.reshard(head_weights(policy, fwd), layout.spec("vocab", None))
    row_spec = layout.spec("head_batch", None, None)

    def local(head_vd: jax.Array, hidden_bgrd: jax.Array, tokens_bgr: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Differentiation sums over devices here: the head's gradient over rows, the states' over the vocabulary.
        head_vd = jax.lax.pcast(head_vd, rows, to="varying")
        hidden_bgrd = jax.lax.pcast(hidden_bgrd, parts, to="varying")
        b, g, r = tokens_bgr.shape
        count = b * g * r
        chunks = -(-count // max(_TOKENS, _POSITIONS * b * g))
        size = -(-count // chunks)
        fill = (0, chunks * size - count)
        hidden = jnp.pad(hidden_bgrd.reshape(count, -1), (fill, (0, 0))).reshape(chunks, size, -1)
        tokens = jnp.pad(tokens_bgr.reshape(count), fill).reshape(chunks, size)
        how = _Distribution(temperature, banned_ids, parts, head_vd.dtype)
        found = _logps(how, hidden, head_vd, tokens)
        logp, entropy = (part.reshape(-1)[:count].reshape(b, g, r) for part in found)
        return logp, entropy

    hidden_spec = layout.spec("head_batch", None, None, None)
    hidden_bgrd = jax.sharding.reshard(hidden_bgrd, hidden_spec)
    tokens = jax.sharding.reshard(jnp.asarray(tokens_bgr), row_spec)
    specs = (layout.spec("vocab", None), hidden_spec, row_spec)
    return jax.shard_map(local, in_specs=specs, out_specs=(row_spec, row_spec))(head_vd, hidden_bgrd, tokens)


class _Distribution(NamedTuple):
    """Settings of the sampling distribution, the mesh axes that shard the vocabulary, and the head's dtype (static)."""

    temperature: float
    banned_ids: tuple[int, ...]
    parts: tuple[str, ...]
    head_dtype: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(
    how: _Distribution, hidden_zmd: jax.Array, head_vd: jax.Array, tokens_zm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies ``[n, m]`` of ``n`` chunks of tokens, one after another, on one device.

    Plain differentiation would store or recompute the intermediates of the softmax and read the logits of a chunk a
    dozen times. Here they are read twice in the forward and once in the backward pass.
    """
    return _logps_forward(how, hidden_zmd, head_vd, tokens_zm)[0]


_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _logps_forward(
    how: _Distribution, hidden_zmd: jax.Array, head_vd: jax.Array, tokens_zm: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Kept]:
    narrow_vd = head_vd.astype(hidden_zmd.dtype)

    def one(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, ...]]:
        scaled, own = _own_logits(how, *chunk, narrow_vd)
        top = jax.lax.pmax(scaled.max(-1), how.parts)
        below = scaled - top[:, None]
        weights = jnp.exp(below)
        sums = (weights.sum(-1), (weights * below).sum(-1), pick(below, own))
        total, spread, picked = jax.lax.psum(sums, how.parts)
        log_total = jnp.log(total)
        # Relative to the top logit: if one token is nearly certain, both terms of the entropy are small.
        return None, (picked - log_total, log_total - spread / total, top + log_total)

    _, (logp, entropy, normalizer) = jax.lax.scan(one, None, (hidden_zmd, tokens_zm))
    return (logp, entropy), (hidden_zmd, narrow_vd, tokens_zm, entropy, normalizer)


def _own_logits(
    how: _Distribution, hidden_md: jax.Array, tokens_m: jax.Array, narrow_vd: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Float32 logits ``[m, v]`` of a device's part of the vocabulary, and the tokens relative to its first id."""
    first_id = jax.lax.axis_index(how.parts) * narrow_vd.shape[0]
    raw = jnp.einsum("md,vd->mv", hidden_md, narrow_vd, preferred_element_type=jnp.float32)
    return sampling_logits(raw, how.temperature, how.banned_ids, first_id), tokens_m - first_id


def _logps_backward(
    how: _Distribution, kept: _Kept, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    hidden_zmd, narrow_vd, tokens_zm, entropy_zm, normalizer_zm = kept

    def one(dhead_vd: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden, tokens, entropy, normalizer, of_logp, of_entropy = chunk
        scaled, own = _own_logits(how, hidden, tokens, narrow_vd)
        logps = scaled - normalizer[:, None]
        # d logp / d logit = [chosen] - p;  d entropy / d logit = -p (log p + entropy).
        slope = of_logp[:, None] + of_entropy[:, None] * (logps + entropy[:, None])
        chosen = jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1) == own[:, None]
        d_raw = jnp.where(chosen, of_logp[:, None], 0) - jnp.exp(logps) * slope
        d_raw = jnp.where(scaled > _IMPOSSIBLE, d_raw / how.temperature, 0).astype(hidden.dtype)
        dhead_vd += jnp.einsum("mv,md->vd", d_raw, hidden, preferred_element_type=jnp.float32)
        return dhead_vd, jnp.einsum("mv,vd->md", d_raw, narrow_vd, preferred_element_type=hidden.dtype)

    zeros = jnp.zeros_like(narrow_vd, jnp.float32)
    dhead_vd, dhidden_zmd = jax.lax.scan(one, zeros, (hidden_zmd, tokens_zm, entropy_zm, normalizer_zm, *gradients))
    return dhidden_zmd, dhead_vd.astype(how.head_dtype), None


_logps.defvjp(_logps_forward, _logps_backward)
