"""Group relative policy optimization: advantages, loss and update. Knows arrays only: no text, no reward service.

The algorithm is DeepSeekMath's (arXiv 2402.03300, section 4.1) as Seg-Zero runs it (arXiv 2503.06520): a clipped ratio,
and the k3 estimate of the KL to a frozen reference inside the loss.

With one update a rollout, as in Seg-Zero, the log-probabilities that sampled are the current ones: the ratio is
``exp(logp - stop_gradient(logp))``, one in value and the policy gradient in derivative, and no separate pass for "old"
log-probabilities exists. With several (``learn``), that pass comes before the first.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from segzero_jax.config import Config, GrpoConfig, TrainConfig
from segzero_jax.model.logprobs import response_logps
from segzero_jax.model.lora import Adapters, adapt
from segzero_jax.model.policy import ForwardConfig, Policy, group_hidden
from segzero_jax.types import Array, PromptBatch, Rollout

ADVANTAGE_EPS = 1e-6
_KL_CLAMP = 10.0
# Rewards are equal that are this near to the group's least, relative to max(1, |least|).
_SAME_REWARD = 1e-9


class TrainState(NamedTuple):
    """What an update changes; donated to it.

    Attributes:
      params: the trainable parameters, float32: the whole policy, or only the LoRA adapters.
      opt_state: AdamW's moments and step counts.
      num_updates: int32, optimizer updates applied so far.
    """

    params: Policy | Adapters
    opt_state: optax.OptState
    num_updates: jax.Array


# Gradients and metrics, summed over micro-batches.
Total = tuple[Policy | Adapters, dict[str, jax.Array]]


# What ``update`` measures.
UPDATE_METRICS = ("loss", "kl", "kl_old", "entropy", "clip_fraction", "sampler_gap", "grad_norm", "update/skipped")


class LossConfig(NamedTuple):
    """The static inputs of the loss.

    Attributes:
      temperature, banned_ids: those that responses are sampled with.
      max_tokens: the limit on a response's length, for ``loss_mean: limit``.
      lora_scale: alpha / rank, the factor on the adapters' product; None where all weights are trained.
    """

    grpo: GrpoConfig
    temperature: float
    banned_ids: tuple[int, ...]
    freeze_vision: bool
    max_tokens: int
    lora_scale: float | None = None


def make_loss_config(config: Config, banned_ids: tuple[int, ...]) -> LossConfig:
    """The loss of a run; ``banned_ids`` are the tokens that it never samples."""
    limits, model = config.rollout, config.model
    frozen, longest = model.freeze_vision, limits.max_response_tokens
    return LossConfig(config.grpo, limits.temperature, banned_ids, frozen, longest, model.lora_scale)


class UpdateBatch(NamedTuple):
    """What one update learns from (a pytree).

    Attributes:
      prompts: the prompts of the rollout.
      rollout: their responses.
      advantages_bg: float32.
      keep_bg: bool, False for a response that is no part of the loss.
      ref_logps_bgr: float32, under the reference policy; None where nothing is to stay near one.
      old_logps_bgr: float32, under the policy that sampled; None where that is the one that learns.
    """

    prompts: PromptBatch
    rollout: Rollout
    advantages_bg: Array
    keep_bg: Array
    ref_logps_bgr: Array | None
    old_logps_bgr: Array | None = None


class Counts(NamedTuple):
    """What the loss of an update is a mean over, float32 scalars: all that count, of all its micro-batches."""

    tokens: jax.Array
    responses: jax.Array


def advantages(rewards_bg: np.ndarray, norm_by_std: bool = True) -> np.ndarray:
    """Rewards relative to their group: ``(r - mean) / (std + 1e-6)``, the std with Bessel's correction.

    Args:
      rewards_bg: float; NaN where a score is missing, which then counts for nothing in its group.
      norm_by_std: without it, ``r - mean`` (Dr. GRPO, arXiv 2503.20783).

    Returns:
      float32 ``[b, g]``; 0 where the score is missing or fewer than two of the group have one.
    """
    rewards_bg = np.asarray(rewards_bg, np.float64)
    present = np.isfinite(rewards_bg)
    count = present.sum(axis=1, keepdims=True)
    least = np.min(rewards_bg, axis=1, keepdims=True, where=present, initial=np.inf)
    # Counted from the least, equal rewards are exactly 0: a rounded mean would leave noise for AdamW to blow up. So
    # would sums of parts that were added in another order, which differ in their last bit.
    above = np.where(present, rewards_bg - least, 0.0)
    above = np.where(above > _SAME_REWARD * np.maximum(1.0, np.abs(least)), above, 0.0)
    deviation = np.where(present, above - above.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    if norm_by_std:
        std = np.sqrt((deviation**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
        deviation = deviation / (std + ADVANTAGE_EPS)
    return np.where(present & (count > 1), deviation, 0.0).astype(np.float32)


def k3_kl(logp: Array, ref_logp: Array) -> jax.Array:
    """Per-token estimate of KL(policy, reference): ``exp(d) - d - 1``, ``d = ref_logp - logp``, at most 10.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k3; the clamp is the released Seg-Zero code's.
    """
    # Beyond ±20 the estimate is past its own clamp; bounding d keeps exp finite, and with it the gradient.
    d = jnp.clip(ref_logp - logp, -20.0, 20.0)
    # exp(d) - 1 as one function: a small d would be lost beside the 1, and the estimate not even be positive.
    return jnp.clip(jnp.expm1(d) - d, -_KL_CLAMP, _KL_CLAMP)


def policy_loss(
    logp: jax.Array, old_logp: Array, advantages_bg: Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate per token, negated, and whether the clipping took effect.

    Args:
      logp, old_logp: ``[b, g, r]``; the old ones carry no gradient.
      advantages_bg: one per response.
    """
    # Bounded, so that where nothing counts, as in padding, the ratio and with it the gradient stay finite.
    ratio = jnp.exp(jnp.clip(logp - jax.lax.stop_gradient(jnp.asarray(old_logp)), -20.0, 20.0))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantage = advantages_bg[..., None]
    return -jnp.minimum(ratio * advantage, clipped * advantage), (clipped * advantage < ratio * advantage)


def token_mask(lengths_bg: Array, keep_bg: Array, length: int) -> jax.Array:
    """Bool ``[b, g, r]``: tokens that are learnt from."""
    return (jnp.arange(length) < jnp.asarray(lengths_bg)[..., None]) & jnp.asarray(keep_bg)[..., None]


def counted(batch: UpdateBatch) -> Counts:
    """What counts of a batch; one where that is nothing."""
    mask = token_mask(batch.rollout.length_bg, batch.keep_bg, batch.rollout.tokens_bgr.shape[-1])
    return Counts(*(jnp.maximum(n, 1).astype(jnp.float32) for n in (mask.sum(), mask.any(axis=-1).sum())))


def loss_mean(loss_bgr: jax.Array, mask_bgr: jax.Array, counts: Counts, loss_config: LossConfig) -> jax.Array:
    """Some tokens' share of the mean over what ``counts`` counts; which mean is ``grpo.loss_mean``'s."""
    masked = jnp.where(mask_bgr, loss_bgr, 0.0)
    match loss_config.grpo.loss_mean:
        case "tokens":
            return masked.sum() / counts.tokens
        case "responses":
            return (masked.sum(axis=-1) / jnp.maximum(mask_bgr.sum(axis=-1), 1)).sum() / counts.responses
        case "limit":
            return masked.sum() / (counts.responses * loss_config.max_tokens)


def group_loss(
    policy: Policy, batch: UpdateBatch, counts: Counts, fwd: ForwardConfig, loss_config: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of some prefix groups, as their share of the mean over what ``counts`` counts.

    Summed over micro-batches this is the mean over the whole batch, whatever the micro-batch size.

    Returns:
      The share of the loss, and shares of means over tokens: ``entropy``, ``clip_fraction``, ``sampler_gap`` (mean
      absolute difference between the log-probabilities of the sampler and, for the same policy, of this pass), ``kl``
      where there is a reference, and ``kl_old``, KL(sampling policy || current policy), where the two differ.
    """
    config = loss_config.grpo
    if loss_config.freeze_vision:
        policy = jax.tree.map(lambda x: x, policy)
        policy.vision = jax.lax.stop_gradient(policy.vision)
    tokens = batch.rollout.tokens_bgr
    hidden = group_hidden(policy, batch.prompts, tokens, fwd)
    logp, entropy = response_logps(policy, hidden, tokens, fwd, loss_config.temperature, loss_config.banned_ids)
    mask = token_mask(batch.rollout.length_bg, batch.keep_bg, tokens.shape[-1])
    mean = lambda x: jnp.where(mask, x, 0.0).sum() / counts.tokens  # noqa: E731
    old = jax.lax.stop_gradient(logp) if batch.old_logps_bgr is None else batch.old_logps_bgr
    surrogate, clipped = policy_loss(logp, old, batch.advantages_bg, config.clip_low, config.clip_high)
    gap = old - batch.rollout.logps_bgr
    if config.importance_cap:
        # Truncated importance sampling: the tokens came from the sampler's distribution, not from this pass's.
        surrogate = surrogate * jnp.minimum(jnp.exp(gap), config.importance_cap)
    loss = surrogate - config.entropy_coef * entropy
    metrics = {"entropy": mean(entropy), "clip_fraction": mean(clipped), "sampler_gap": mean(jnp.abs(gap))}
    if batch.old_logps_bgr is not None:
        metrics["kl_old"] = mean(k3_kl(old, logp))
    if batch.ref_logps_bgr is not None:
        kl = k3_kl(logp, batch.ref_logps_bgr)
        loss = loss + config.kl_coef * kl
        metrics["kl"] = mean(kl)
    metrics["loss"] = loss_mean(loss, mask, counts, loss_config)
    return metrics["loss"], metrics


def full_policy(params: Policy | Adapters, base: Policy | None, loss_config: LossConfig) -> Policy:
    """The policy that trainable parameters are, or that the adapters among them belong to."""
    if isinstance(params, Policy):
        return params
    assert base is not None, "adapters are on something"
    return adapt(base, params, loss_config.lora_scale)


def learning_rate(config: TrainConfig, done: int | jax.Array) -> float | jax.Array:
    """The rate of the update after ``done`` others: ``lr``, in a warm-up a part of it, then as ``lr_decay`` says."""
    rate: float | jax.Array = config.lr
    if config.warmup_steps:
        rate = rate * jnp.minimum(1.0, (done + 1) / config.warmup_steps)
    if config.lr_decay != "none":
        left = jnp.clip((config.decay_steps - done) / (config.decay_steps - config.warmup_steps), 0.0, 1.0)
        rate = rate * (left if config.lr_decay == "linear" else (1 - jnp.cos(jnp.pi * left)) / 2)
    return rate


def make_optimizer(config: TrainConfig, freeze_vision: bool) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; a frozen vision tower gets neither moments nor decay."""
    constant = config.warmup_steps == 0 and config.lr_decay == "none"
    lr: float | optax.Schedule = config.lr if constant else partial(learning_rate, config)
    adamw = optax.adamw(
        lr, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mu_dtype=config.moment_dtype
    )
    if freeze_vision:
        adamw = optax.partition({"train": adamw, "freeze": optax.set_to_zero()}, _label_frozen)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _label_frozen(policy: Policy) -> Policy:
    label = lambda path, _: "freeze" if path[0].name == "vision" else "train"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, policy)


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """``[b, ...]`` to ``[parts, b / parts, ...]``: part i holds rows i, i + parts, ...: every shard keeps its own."""
    rows, *others = jax.typeof(x).sharding.spec
    # Said, not inferred: of several mesh axes over the rows, an inferred one may go to the parts.
    spec = jax.sharding.PartitionSpec(rows, None, *others)
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:]), out_sharding=spec), 1, 0)


def _part_of(split: jax.Array, index: int | jax.Array) -> jax.Array:
    """One part of what ``_split_rows`` made."""
    # Said as well: jax 0.12 forgets the sharding of a part that holds a single number.
    return jax.sharding.reshard(split[index], jax.sharding.PartitionSpec(*jax.typeof(split).sharding.spec[1:]))


@partial(jax.jit, static_argnames=("optimizer", "fwd", "loss_config", "micro_batches"), donate_argnames=("state",))
def update(
    state: TrainState,
    batch: UpdateBatch,
    *,
    optimizer: optax.GradientTransformation,
    fwd: ForwardConfig,
    loss_config: LossConfig,
    micro_batches: int,
    base: Policy | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Gradients of the loss of all groups, accumulated over micro-batches, clip, AdamW.

    Where the loss or the norm of the gradient is not finite, the new state is the old one, bit for bit.

    Args:
      state: donated.
      micro_batches: how many parts the batch is worked through in; the result does not depend on it.
      base: what the state's adapters are on; None where all weights learn.

    Returns:
      The new state and float32 scalars: ``loss`` and the means of ``group_loss``, ``grad_norm`` before clipping, and
      ``update/skipped``, 1 where the state was kept.
    """
    counts = counted(batch)
    # Here blocks keep something for the backward pass, which a loop on a GPU would copy. With remat it is little.
    fwd = fwd._replace(written_out=fwd.kernel == "cudnn" and not fwd.remat)

    def loss_of(params: Policy | Adapters, part: UpdateBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return group_loss(full_policy(params, base, loss_config), part, counts, fwd, loss_config)

    def gradients_of(part: UpdateBatch) -> Total:
        (_, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, part)
        return gradients, metrics

    if micro_batches == 1:
        gradients, metrics = gradients_of(batch)
    else:
        parts = jax.tree.map(lambda x: _split_rows(jnp.asarray(x), micro_batches), batch)
        like = jax.eval_shape(lambda parts: gradients_of(jax.tree.map(lambda x: _part_of(x, 0), parts)), parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding.spec), like)
        add = lambda total, part: (jax.tree.map(jnp.add, total, gradients_of(part)), None)  # noqa: E731
        (gradients, metrics), _ = jax.lax.scan(add, zeros, parts)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.tree.norm(gradients)
    # The norm is finite only where every gradient is.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    metrics["update/skipped"] = 1.0 - finite.astype(jnp.float32)
    updated = TrainState(params, opt_state, state.num_updates + 1)
    return jax.tree.map(partial(jax.lax.select, finite), updated, state), metrics


@partial(jax.jit, static_argnames=("parts",))
def _take_part(batch: UpdateBatch, index: int, parts: int) -> UpdateBatch:
    return jax.tree.map(lambda x: _part_of(_split_rows(jnp.asarray(x), parts), index), batch)


def learn(
    state: TrainState,
    batch: UpdateBatch,
    keep_bg: np.ndarray,
    *,
    optimizer: optax.GradientTransformation,
    fwd: ForwardConfig,
    loss_config: LossConfig,
    mini_batches: int,
    micro_batches: int,
    base: Policy | None = None,
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    """The updates of one rollout: ``grpo.iterations`` times through the batch, one for each mini-batch.

    A mini-batch of which nothing counts makes no update: neither momentum nor weight decay should move the policy.

    Args:
      state: donated.
      batch: with ``old_logps_bgr`` where there is more than one update.
      keep_bg: the batch's, on the host.
      mini_batches: how many parts the batch is split into, an update each; groups stay whole.
      micro_batches, base: see ``update``; micro-batches of each mini-batch.

    Returns:
      The new state, and what each update measured.
    """
    metrics = []
    kept = [part for part in range(mini_batches) if keep_bg[part::mini_batches].any()]
    for _ in range(loss_config.grpo.iterations):
        for part in kept:
            chosen = batch if mini_batches == 1 else _take_part(batch, part, mini_batches)
            state, measured = update(
                state,
                chosen,
                base=base,
                optimizer=optimizer,
                fwd=fwd,
                loss_config=loss_config,
                micro_batches=micro_batches,
            )
            # One after another: parts that waited for their turn would lie in memory together.
            metrics.append(jax.block_until_ready(measured))
    return state, metrics


@partial(jax.jit, static_argnames=("fwd", "loss_config"))
def policy_logps(
    policy: Policy, prompts: PromptBatch, tokens_bgr: Array, *, fwd: ForwardConfig, loss_config: LossConfig
) -> jax.Array:
    """Log-probabilities of the responses under a policy that does not learn now, float32 ``[b, g, r]``."""
    hidden = group_hidden(policy, prompts, tokens_bgr, fwd)
    return response_logps(policy, hidden, tokens_bgr, fwd, loss_config.temperature, loss_config.banned_ids)[0]


def initial_state(params: Policy | Adapters, optimizer: optax.GradientTransformation) -> TrainState:
    """A state before its first update, made in one program: the update then compiles once for it and its successors."""
    return TrainState(params, *jax.jit(lambda params: (optimizer.init(params), jnp.int32(0)))(params))
