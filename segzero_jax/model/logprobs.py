"""The policy's distribution over tokens: one definition for sampling, reference and update.

Logits are divided by the sampling temperature, and the visual special tokens are impossible: a sampled
``<|image_pad|>`` is not an image. Full logits of a batch never exist: the vocabulary is walked in chunks of tokens.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from segzero_jax.model.layers import linear
from segzero_jax.model.policy import Pass, Policy, head_weights
from segzero_jax.types import Array

_IMPOSSIBLE = -1e30
# A chunk has this many tokens on each device, in whole positions and at least _POSITIONS of them: its logits are what a
# device has to hold.
_TOKENS, _POSITIONS = 1024, 32


def sampling_logits(
    raw: jax.Array, temperature: float, banned_ids: tuple[int, ...], first_id: int | jax.Array = 0
) -> jax.Array:
    """Logits of the distribution that is sampled from, float32 ``[..., v]``, of ``v`` tokens from ``first_id`` on."""
    vocabulary = first_id + jax.lax.broadcasted_iota(jnp.int32, (raw.shape[-1],), 0)
    banned = jnp.isin(vocabulary, jnp.asarray(banned_ids, jnp.int32))
    banned = jax.sharding.reshard(banned, PartitionSpec(jax.typeof(raw).sharding.spec[-1]))
    return jnp.where(banned, _IMPOSSIBLE, raw / temperature)


def pick(values_v: jax.Array, tokens: jax.Array) -> jax.Array:
    """``values[..., token]`` by comparison and sum, which leaves a sharded vocabulary where it is."""
    iota = jax.lax.broadcasted_iota(jnp.int32, values_v.shape, values_v.ndim - 1)
    iota = jax.sharding.reshard(iota, jax.typeof(values_v).sharding.spec)
    return jnp.where(iota == tokens[..., None], values_v, 0).sum(-1)


def response_logps(
    policy: Policy,
    hidden_bgrd: jax.Array,
    tokens_bgr: Array,
    setup: Pass,
    temperature: float,
    banned_ids: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every response token and the entropy where it was chosen.

    Each device has its rows and its part of the vocabulary. The head is brought there once, before the chunks, and its
    gradient leaves once, after them.

    Args:
      hidden_bgrd: states that predict the tokens (``group_hidden``).
      tokens_bgr: int32.

    Returns:
      float32 ``[b, g, r]`` each, in nats. Chunks are recomputed in the backward pass: memory is one chunk of logits.
    """
    layout = setup.layout
    rows, parts = layout.over("batch"), layout.over("vocab")
    head_vd = jax.sharding.reshard(head_weights(policy, setup), layout.spec("vocab", None))
    row_spec = layout.spec("batch", None, None)

    def local(head_vd: jax.Array, hidden_bgrd: jax.Array, tokens_bgr: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Where differentiation sums over devices: the head's gradient over rows, the states' over the vocabulary.
        head_vd = jax.lax.pcast(head_vd, rows, to="varying")
        hidden_bgrd = jax.lax.pcast(hidden_bgrd, parts, to="varying")
        first_id = jax.lax.axis_index(parts) * head_vd.shape[0]

        @jax.checkpoint
        def one(hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            raw = linear("bgrd,vd->bgrv", hidden, head_vd, None, PartitionSpec(), jnp.float32)
            scaled = sampling_logits(raw, temperature, banned_ids, first_id)
            top = jax.lax.pmax(jax.lax.stop_gradient(scaled.max(-1)), parts)
            total = top + jnp.log(jax.lax.psum(jnp.exp(scaled - top[..., None]).sum(-1), parts))
            logp = jax.lax.psum(pick(scaled, tokens - first_id), parts) - total
            # Not total - sum(p * scaled): where one token is nearly certain, that is a difference of large numbers.
            every = scaled - total[..., None]
            entropy = -jnp.where(scaled > _IMPOSSIBLE, jnp.exp(every) * every, 0).sum(-1)
            return logp, jax.lax.psum(entropy, parts)

        b, g, r = tokens_bgr.shape
        limit = min(r, max(_POSITIONS, _TOKENS // (b * g)))
        chunk = next(size for size in range(limit, 0, -1) if r % size == 0)
        chunks = lambda a: jnp.moveaxis(a.reshape(b, g, r // chunk, chunk, *a.shape[3:]), 2, 0)  # noqa: E731
        _, found = jax.lax.scan(lambda _, part: (None, one(*part)), None, (chunks(hidden_bgrd), chunks(tokens_bgr)))
        logp, entropy = (jnp.moveaxis(part, 0, 2).reshape(b, g, r) for part in found)
        return logp, entropy

    hidden_spec = layout.spec("batch", None, None, None)
    hidden_bgrd = jax.sharding.reshard(hidden_bgrd, hidden_spec)
    tokens = jax.sharding.reshard(jnp.asarray(tokens_bgr), row_spec)
    specs = (layout.spec("vocab", None), hidden_spec, row_spec)
    return jax.shard_map(local, in_specs=specs, out_specs=(row_spec, row_spec))(head_vd, hidden_bgrd, tokens)
