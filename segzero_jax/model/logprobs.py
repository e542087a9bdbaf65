"""The policy's distribution over tokens: one definition for sampling, reference and update.

Logits are divided by the sampling temperature, and the visual special tokens are impossible: a sampled
``<|image_pad|>`` is not an image. Full logits of a batch never exist: the vocabulary is walked in chunks of tokens.
"""

import math

import jax
import jax.numpy as jnp

from segzero_jax.model.policy import Pass, Policy, logits
from segzero_jax.types import Array

_IMPOSSIBLE = -1e30
# A chunk has this many tokens on each device, in whole positions and at least _POSITIONS of them. A larger one needs
# more memory for logits; a smaller one gathers the head and reduces its gradient more often.
_TOKENS, _POSITIONS = 1024, 32


def sampling_logits(raw: jax.Array, temperature: float, banned_ids: tuple[int, ...]) -> jax.Array:
    """Logits of the distribution that is sampled from, float32 ``[..., v]``."""
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, (raw.shape[-1],), 0)
    banned = jnp.isin(vocabulary, jnp.asarray(banned_ids, jnp.int32))
    banned = jax.sharding.reshard(banned, jax.sharding.PartitionSpec(jax.typeof(raw).sharding.spec[-1]))
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

    Args:
      hidden_bgrd: states that predict the tokens (``group_hidden``).
      tokens_bgr: int32.

    Returns:
      float32 ``[b, g, r]`` each, in nats. Chunks are recomputed in the backward pass: memory is one chunk of logits.
    """
    b, g, r = tokens_bgr.shape
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in setup.layout.over("batch"))
    limit = min(r, max(_POSITIONS, _TOKENS * devices // (b * g)))
    chunk = next(size for size in range(limit, 0, -1) if r % size == 0)
    rows = setup.layout.spec("batch", None, None)

    @jax.checkpoint
    def one(hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = sampling_logits(logits(policy, hidden, setup), temperature, banned_ids)
        total = jax.nn.logsumexp(scaled, axis=-1)
        tokens = jax.sharding.reshard(tokens, setup.layout.spec("mlp_batch", None, None))
        logp = pick(scaled, tokens) - total
        # Not total - sum(p * scaled): where one token is nearly certain, that would be a difference of large numbers.
        every = scaled - total[..., None]
        entropy = -jnp.where(scaled > _IMPOSSIBLE, jnp.exp(every) * every, 0).sum(-1)
        return jax.sharding.reshard(logp, rows), jax.sharding.reshard(entropy, rows)

    chunks = lambda a: jnp.moveaxis(jnp.asarray(a).reshape(b, g, r // chunk, chunk, *a.shape[3:]), 2, 0)  # noqa: E731
    _, parts = jax.lax.scan(lambda _, part: (None, one(*part)), None, (chunks(hidden_bgrd), chunks(tokens_bgr)))
    logp, entropy = (jnp.moveaxis(part, 0, 2).reshape(b, g, r) for part in parts)
    return logp, entropy
