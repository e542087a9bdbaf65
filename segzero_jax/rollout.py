"""Rollout: one prefill per prompt, G sampled continuations, in a jitted program that ends when all have ended."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segzero_jax.mesh import ROLLOUT, TRAIN
from segzero_jax.model.attention import KeyValue
from segzero_jax.model.dims import Dims
from segzero_jax.model.logprobs import log_probability, sampling_logits
from segzero_jax.model.lora import abstract_adapted
from segzero_jax.model.policy import DecodeCache, ForwardConfig, Policy, decode, empty_cache, in_layout, logits, prefill
from segzero_jax.types import PromptBatch, Rollout


class Sampling(NamedTuple):
    """How tokens are chosen (static).

    Attributes:
      group: responses per prompt.
      max_tokens: responses are truncated to this length.
      end_ids: tokens that end a response; the end token is part of it.
      pad_id: fills the rest.
      banned_ids: tokens that are never sampled.
      temperature: > 0.
      top_p: sample from the smallest set of tokens with this much probability; 1 disables it.
      top_k: sample from this many tokens; 0 disables it.
      greedy: take the most probable token instead of sampling.
      repetition_penalty: divides the logit of a token that is already in the prompt or the response, or multiplies it
        if it is negative (CTRL, arXiv 1909.05858, and transformers' ``generate``); 1 disables it.
    """

    group: int
    max_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    banned_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    repetition_penalty: float = 1.0


# Most responses end within this many tokens.
_FIRST_ROOM = 256


def padding_multiple(limit: int) -> int:
    """Lengths up to ``limit`` are padded to multiples of this: few programs to compile, few padding tokens to run."""
    return 16 if limit <= 256 else 128


def cache_lengths(limit: int) -> tuple[int, ...]:
    """The successive lengths of the response KV cache, up to ``limit``.

    A decode step reads the whole cache: while responses are short, it should be small.
    """
    return (*(room for room in (_FIRST_ROOM << n for n in range(limit.bit_length())) if 3 * room <= 2 * limit), limit)


def rollout_layout(dims: Dims, dtype: jnp.dtype, lora_rank: int = 0) -> jax.stages.Wrapped:
    """A jitted ``Policy -> Policy`` that casts weights and reshards them for rollout under the ambient mesh."""
    specs = [
        jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_adapted(dims, lora_rank, layout))
        for layout in (TRAIN, ROLLOUT)
    ]

    @jax.jit
    def to_rollout(policy: Policy) -> Policy:
        policy = jax.tree.map(lambda x: x.astype(dtype), policy)
        # Through TRAIN: out of FSDP's shards, XLA would make whole matrices first.
        for layout in specs:
            policy = jax.tree.map(jax.sharding.reshard, policy, layout)
        return policy

    return to_rollout


class Prefilled(NamedTuple):
    """Prompts that the policy has read, in ``ROLLOUT``: what ``prefill`` returns.

    Attributes:
      hidden_bd: the hidden state after the last token of each prompt.
      cache: keys and values of all layers, ``[layer, b, p, k, h]``.
    """

    hidden_bd: jax.Array
    cache: KeyValue


@partial(jax.jit, static_argnames="fwd")
def prefill_prompts(policy: Policy, batch: PromptBatch, *, fwd: ForwardConfig) -> Prefilled:
    """Runs prompts in a layout for training, and reshards the result for sampling.

    Weights in ``ROLLOUT`` stay where they are, which suits a token of each response: for whole prompts, sums and
    exchanges of activations take longer than gathering weights does in ``FSDP``, or the sums that are left in
    ``TRAIN``, and overlap with nothing.
    """
    hidden_bd, cache = prefill(policy, batch, fwd)
    hidden_bd = jax.sharding.reshard(hidden_bd, ROLLOUT.spec("batch", None))
    return Prefilled(hidden_bd, in_layout(cache, fwd.dims, ROLLOUT))


class _Progress(NamedTuple):
    """The state of sampling: tokens sampled so far, and the hidden states ``[b, g, d]`` that predict the next ones.

    ``seen_bgv`` marks the tokens that a repetition penalty applies to; None without one.
    """

    step: jax.Array
    hidden_bgd: jax.Array
    cache: DecodeCache
    tokens_bgr: jax.Array
    logps_bgr: jax.Array
    length_bg: jax.Array
    done_bg: jax.Array
    seen_bgv: jax.Array | None


def truncate(logits_bgv: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """Keeps the ``top_k`` largest logits and, of those, the smallest set with probability ``top_p``.

    Ties with the last kept logit are kept. As in nucleus sampling (Holtzman et al., arXiv 1904.09751), the token that
    crosses ``top_p`` is kept.
    """
    ordered = jnp.sort(logits_bgv, axis=-1, descending=True)
    smallest = ordered[..., -1:]
    if top_k:
        smallest = ordered[..., min(top_k, ordered.shape[-1]) - 1, None]
        ordered = jnp.where(ordered >= smallest, ordered, -jnp.inf)
    if top_p < 1:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.where((before < top_p) & (ordered >= smallest), ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_bgv >= smallest, logits_bgv, -jnp.inf)


def _choose(scaled_bgv: jax.Array, key: jax.Array, sampling: Sampling, fwd: ForwardConfig) -> jax.Array:
    if sampling.greedy:
        return scaled_bgv.argmax(-1).astype(jnp.int32)
    # The noise of row b depends only on the key, b, g and v, not on the mesh or on how many rows follow.
    spec = fwd.layout.spec("head_batch", None, "vocab")
    noise = jax.random.gumbel(key, scaled_bgv.shape, jnp.float32, out_sharding=spec)
    if sampling.top_p < 1 or sampling.top_k:
        # A sort needs a row's whole vocabulary in one place; only these options pay for it.
        whole = jax.sharding.reshard(scaled_bgv, fwd.layout.spec("batch", None, None))
        scaled_bgv = jax.sharding.reshard(truncate(whole, sampling.top_p, sampling.top_k), spec)
    return (scaled_bgv + noise).argmax(-1).astype(jnp.int32)


def _seen(batch: PromptBatch, sampling: Sampling, fwd: ForwardConfig) -> jax.Array:
    """Which tokens occur in a prompt, bool ``[b, g, v]``, sharded like logits."""
    (b, p), v = batch.tokens_bp.shape, fwd.dims.vocab
    # Padding is not in the prompt: it is mapped to an id past the vocabulary and dropped.
    tokens_bp = jnp.where(jnp.arange(p) < batch.length_b[:, None], batch.tokens_bp, v)
    row_bp = jax.lax.broadcasted_iota(jnp.int32, (b, p), 0)
    whole = jax.sharding.PartitionSpec(None, None)
    tokens_bp, row_bp = jax.sharding.reshard(tokens_bp, whole), jax.sharding.reshard(row_bp, whole)
    seen_bv = jnp.zeros((b, v), bool).at[row_bp, tokens_bp].set(True, mode="drop")
    seen_bgv = jnp.broadcast_to(seen_bv[:, None], (b, sampling.group, v))
    return jax.sharding.reshard(seen_bgv, fwd.layout.spec("head_batch", None, "vocab"))


def _penalised(logits_bgv: jax.Array, seen_bgv: jax.Array, penalty: float) -> jax.Array:
    lower = jnp.where(logits_bgv < 0, logits_bgv * penalty, logits_bgv / penalty)
    return jnp.where(seen_bgv, lower, logits_bgv)


def _start(
    hidden_bd: jax.Array, prompt: KeyValue, batch: PromptBatch, fwd: ForwardConfig, sampling: Sampling
) -> _Progress:
    """The state after prefill, before any token is sampled."""
    b, g, length = hidden_bd.shape[0], sampling.group, sampling.max_tokens
    rows, tokens = fwd.layout.spec("batch", None), fwd.layout.spec("batch", None, None)
    return _Progress(
        step=jnp.int32(0),
        hidden_bgd=jnp.broadcast_to(hidden_bd[:, None], (b, g, hidden_bd.shape[-1])),
        cache=empty_cache(prompt, g, cache_lengths(length)[0], fwd.layout),
        tokens_bgr=jnp.full((b, g, length), sampling.pad_id, jnp.int32, out_sharding=tokens),
        logps_bgr=jnp.zeros((b, g, length), jnp.float32, out_sharding=tokens),
        length_bg=jnp.zeros((b, g), jnp.int32, out_sharding=rows),
        done_bg=jnp.zeros((b, g), bool, out_sharding=rows),
        seen_bgv=None if sampling.repetition_penalty == 1 else _seen(batch, sampling, fwd),
    )


def _with_room(progress: _Progress, length: int) -> _Progress:
    """The same state, with a cache for ``length`` tokens of each response."""
    own = progress.cache.response
    more = [(0, 0)] * 3 + [(0, length - own.k.shape[3])] + [(0, 0)] * 2
    return progress._replace(cache=progress.cache._replace(response=KeyValue(*(jnp.pad(x, more) for x in own))))


@jax.named_scope("decode_step")
def _decode_step(
    policy: Policy, batch: PromptBatch, key: jax.Array, progress: _Progress, fwd: ForwardConfig, sampling: Sampling
) -> _Progress:
    """Samples one more token of every unfinished response, and runs the policy on it."""
    step, done = progress.step, progress.done_bg
    rows = fwd.layout.spec("batch", None)
    raw, seen = logits(policy, progress.hidden_bgd, fwd), progress.seen_bgv
    if seen is not None:
        raw = _penalised(raw, seen, sampling.repetition_penalty)
    scaled = sampling_logits(raw, sampling.temperature, sampling.banned_ids)
    chosen = _choose(scaled, jax.random.fold_in(key, step), sampling, fwd)
    logp = log_probability(scaled, chosen)
    if seen is not None:
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, seen.shape, 2, out_sharding=jax.typeof(seen).sharding)
        seen |= vocabulary == chosen[..., None]
    token = jnp.where(done, sampling.pad_id, jax.sharding.reshard(chosen, rows))
    logp = jnp.where(done, 0.0, jax.sharding.reshard(logp, rows))
    hidden, cache = decode(policy, batch, token, step, progress.cache, fwd)
    at = (0, 0, step)
    return _Progress(
        step=step + 1,
        hidden_bgd=hidden,
        cache=cache,
        tokens_bgr=jax.lax.dynamic_update_slice(progress.tokens_bgr, token[..., None], at),
        logps_bgr=jax.lax.dynamic_update_slice(progress.logps_bgr, logp[..., None], at),
        length_bg=progress.length_bg + ~done,
        done_bg=done | (token[..., None] == jnp.asarray(sampling.end_ids, jnp.int32)).any(-1),
        seen_bgv=seen,
    )


@partial(jax.jit, static_argnames=("fwd", "sampling"))
def sample(
    policy: Policy,
    batch: PromptBatch,
    key: jax.Array,
    *,
    fwd: ForwardConfig,
    sampling: Sampling,
    prefilled: Prefilled | None = None,
) -> Rollout:
    """Samples ``sampling.group`` responses to every prompt.

    Args:
      policy: weights in the layout of ``fwd``.
      batch: prompts; their number must be divisible over the layout's batch axes.
      key: random key from the seed and the step; row ``b`` of a batch draws the same tokens on every mesh.
      prefilled: the prompts as this policy has read them; by default they are read here, in the layout of ``fwd``.

    Returns:
      Responses of static length ``sampling.max_tokens``. The log-probability of a token is under the distribution at
      temperature, before top-p and top-k.
    """
    read = prefill(policy, batch, fwd) if prefilled is None else prefilled
    progress = _start(*read, batch, fwd, sampling)
    for length in cache_lengths(sampling.max_tokens):
        progress = _run(policy, batch, key, _with_room(progress, length), fwd, sampling, length)
    return _rollout(progress)


def sample_in_parts(
    policy: Policy, batch: PromptBatch, key: jax.Array, *, fwd: ForwardConfig, sampling: Sampling, tokens: int
) -> Iterator[Rollout]:
    """Yields the result of ``sample`` as it grows: after every ``tokens`` tokens, and at the end.

    The loop stops and restarts between two programs: nothing calls back to the host from inside one.
    """
    progress = _begin_alone(policy, batch, fwd=fwd, sampling=sampling)
    limit, ended = 0, False
    while limit < sampling.max_tokens and not ended:
        limit = min(limit + tokens, sampling.max_tokens)
        progress = _grow_alone(progress, next(room for room in cache_lengths(sampling.max_tokens) if room >= limit))
        progress = _run_alone(policy, batch, key, progress, fwd=fwd, sampling=sampling, limit=limit)
        # Copied, because the buffers are donated to the next part.
        seen = jax.tree.map(np.array, jax.device_get(_rollout(progress)))
        ended = bool(seen.finished_bg.all())
        yield seen


def _begin(policy: Policy, batch: PromptBatch, fwd: ForwardConfig, sampling: Sampling) -> _Progress:
    return _start(*prefill(policy, batch, fwd), batch, fwd, sampling)


def _run(
    policy: Policy,
    batch: PromptBatch,
    key: jax.Array,
    progress: _Progress,
    fwd: ForwardConfig,
    sampling: Sampling,
    limit: int | jax.Array,
) -> _Progress:
    """Samples until responses have ``limit`` tokens or all have ended."""
    return jax.lax.while_loop(
        lambda progress: (progress.step < limit) & ~progress.done_bg.all(),
        lambda progress: _decode_step(policy, batch, key, progress, fwd, sampling),
        progress,
    )


_grow_alone = partial(jax.jit, static_argnums=1)(_with_room)
_begin_alone = partial(jax.jit, static_argnames=("fwd", "sampling"))(_begin)
_run_alone = partial(jax.jit, static_argnames=("fwd", "sampling"), donate_argnames=("progress",))(_run)


def _rollout(end: _Progress) -> Rollout:
    return Rollout(end.tokens_bgr, end.length_bg, end.logps_bgr, end.done_bg)
