"""The prefix group: one prompt, G responses, one attention function for prefill, decode, reference, update and vision.

A prompt token sees earlier prompt tokens; a response token sees the whole prompt and its own earlier
tokens. Keys and values of the prompt exist once for the G responses, so a decode step reads them
once and an update computes them once. Nothing is approximated: for each response this is the attention of
the sequence ``prompt + response``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30


class KeyValue(NamedTuple):
    """Keys and values: ``[b, g, s, k, h]`` of a response or a window, ``[b, p, k, h]`` of a prompt."""

    k: jax.Array
    v: jax.Array


def attend(
    q_bgtnh: jax.Array,
    own: KeyValue,
    own_mask: jax.Array,
    prompt: KeyValue | None = None,
    prompt_mask_bp: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention over a group's own keys and, where given, the prompt's: one softmax over both.

    Args:
      q_bgtnh: queries; ``n`` is a multiple of ``k`` and query head ``n`` reads key head ``n // (N / K)``.
      own: keys and values ``[b, g, s, k, h]`` of the same group.
      own_mask: bool, broadcastable to ``[b, g, t, s]``: which own keys a query sees.
      prompt: keys and values ``[b, p, k, h]`` that all groups of a row share.
      prompt_mask_bp: bool, which prompt keys are real.

    Returns:
      ``[b, g, t, n, h]`` in the dtype of ``q``; scores and softmax are float32.
    """
    b, g, t, n, h = q_bgtnh.shape
    kv_heads = own.k.shape[3]
    q = q_bgtnh.reshape(b, g, t, kv_heads, n // kv_heads, h) * jnp.asarray(h**-0.5, q_bgtnh.dtype)
    scores = jnp.einsum("bgtkqh,bgskh->bgkqts", q, own.k, preferred_element_type=jnp.float32)
    scores = jnp.where(own_mask[:, :, None, None], scores, _MASKED)
    top = scores.max(-1, keepdims=True)
    if prompt is not None:
        assert prompt_mask_bp is not None
        prompt_scores = jnp.einsum("bgtkqh,bpkh->bgkqtp", q, prompt.k, preferred_element_type=jnp.float32)
        prompt_scores = jnp.where(prompt_mask_bp[:, None, None, None, None], prompt_scores, _MASKED)
        top = jnp.maximum(top, prompt_scores.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    # The softmax over both parts without joining them: sums of the parts are divided at the end, by the sum of both.
    weights = jnp.exp(scores - top)
    total = weights.sum(-1)
    out = jnp.einsum("bgkqts,bgskh->bgtkqh", weights.astype(q.dtype), own.v, preferred_element_type=jnp.float32)
    if prompt is not None:
        weights = jnp.exp(prompt_scores - top)
        total += weights.sum(-1)
        weights = weights.astype(q.dtype)
        out += jnp.einsum("bgkqtp,bpkh->bgtkqh", weights, prompt.v, preferred_element_type=jnp.float32)
    out = out / jnp.moveaxis(total, -1, 2)[..., None]
    return out.reshape(b, g, t, n, h).astype(q.dtype)


def causal_mask(length: int) -> jax.Array:
    """Bool ``[1, 1, length, length]``: a query sees itself and what came before."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
