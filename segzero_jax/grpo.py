"""Group-relative policy optimization: advantages, loss and update. Works on arrays only: no text, no reward service.

The algorithm is DeepSeekMath's (arXiv 2402.03300, section 4.1) as Seg-Zero runs it (arXiv 2503.06520): a clipped ratio
and, inside the loss, the k3 estimate of the KL to a frozen reference.

With one update per rollout, as in Seg-Zero, the policy that sampled is the current one. The ratio is then
``exp(logp - stop_gradient(logp))``: its value is 1, its derivative is the policy gradient, and no separate pass
computes "old" log-probabilities. With several updates (``learn``), that pass runs before the first.
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
# Rewards within this distance of their group's minimum count as equal to it; relative to max(1, |minimum|).
_SAME_REWARD = 1e-9


class TrainState(NamedTuple):
    """The state that an update changes; its buffers are donated.

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


# Metrics of ``update``.
UPDATE_METRICS = ("loss", "kl", "kl_old", "entropy", "clip_fraction", "sampler_gap", "grad_norm", "update/skipped")


class LossConfig(NamedTuple):
    """The static inputs of the loss.

    Attributes:
      temperature, banned_ids: the values that responses are sampled with.
      max_tokens: the limit on a response's length, for ``loss_mean: limit``.
      lora_scale: alpha / rank, the factor on the adapters' product; None when all weights are trained.
    """

    grpo: GrpoConfig
    temperature: float
    banned_ids: tuple[int, ...]
    freeze_vision: bool
    max_tokens: int
    lora_scale: float | None = None


def make_loss_config(config: Config, banned_ids: tuple[int, ...]) -> LossConfig:
    """The loss configuration of a run; ``banned_ids`` are the tokens that it never samples."""
    limits, model = config.rollout, config.model
    frozen, longest = model.freeze_vision, limits.max_response_tokens
    return LossConfig(config.grpo, limits.temperature, banned_ids, frozen, longest, model.lora_scale)


class UpdateBatch(NamedTuple):
    """The data of one update (a pytree).

    Attributes:
      prompts: the prompts of the rollout.
      rollout: their responses.
      advantages_bg: float32.
      keep_bg: bool, False for a response that is excluded from the loss.
      ref_logps_bgr: float32, under the reference policy; None without one.
      old_logps_bgr: float32, under the policy that sampled; None when that is the policy being updated.
    """

    prompts: PromptBatch
    rollout: Rollout
    advantages_bg: Array
    keep_bg: Array
    ref_logps_bgr: Array | None
    old_logps_bgr: Array | None = None


class Counts(NamedTuple):
    """Numbers of tokens and responses in an update's loss, over all its micro-batches; float32 scalars."""

    tokens: jax.Array
    responses: jax.Array


def advantages(rewards_bg: np.ndarray, norm_by_std: bool = True) -> np.ndarray:
    """Group-relative advantages: ``(r - mean) / (std + 1e-6)``, the std with Bessel's correction.

    Args:
      rewards_bg: float; NaN for a missing score, which its group's mean and std then ignore.
      norm_by_std: False gives ``r - mean`` (Dr. GRPO, arXiv 2503.20783).

    Returns:
      float32 ``[b, g]``; 0 where the score is missing or fewer than two responses of the group have one.
    """
    rewards_bg = np.asarray(rewards_bg, np.float64)
    present = np.isfinite(rewards_bg)
    count = present.sum(axis=1, keepdims=True)
    least = np.min(rewards_bg, axis=1, keepdims=True, where=present, initial=np.inf)
    # Measured from the minimum, equal rewards are exactly 0. A rounded mean would leave noise that AdamW amplifies; so
    # would rewards whose components were summed in different orders, as those differ in the last bit.
    above = np.where(present, rewards_bg - least, 0.0)
    above = np.where(above > _SAME_REWARD * np.maximum(1.0, np.abs(least)), above, 0.0)
    deviation = np.where(present, above - above.sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0)
    if norm_by_std:
        std = np.sqrt((deviation**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
        deviation = deviation / (std + ADVANTAGE_EPS)
    return np.where(present & (count > 1), deviation, 0.0).astype(np.float32)


def k3_kl(logp: Array, ref_logp: Array) -> jax.Array:
    """Per-token estimate of KL(policy, reference): ``exp(d) - d - 1``, ``d = ref_logp - logp``, at most 10.

    Source: J. Schulman, "Approximating KL divergence" (2020), estimator k3; clamp as in the released Seg-Zero code.
    """
    # Beyond ±20 the estimate exceeds its own clamp; bounding d keeps exp, and so the gradient, finite.
    d = jnp.clip(ref_logp - logp, -20.0, 20.0)
    # expm1, because in exp(d) - 1 a small d would be lost to rounding and the estimate might not even be positive.
    return jnp.clip(jnp.expm1(d) - d, -_KL_CLAMP, _KL_CLAMP)


def policy_loss(
    logp: jax.Array, old_logp: Array, advantages_bg: Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate per token, negated, and whether the clipping took effect.

    Args:
      logp, old_logp: ``[b, g, r]``; ``old_logp`` carries no gradient.
      advantages_bg: one per response.
    """
    # Bounded so that the ratio and the gradient stay finite at masked tokens, such as padding.
    ratio = jnp.exp(jnp.clip(logp - jax.lax.stop_gradient(jnp.asarray(old_logp)), -20.0, 20.0))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantage = advantages_bg[..., None]
    return -jnp.minimum(ratio * advantage, clipped * advantage), (clipped * advantage < ratio * advantage)


def token_mask(lengths_bg: Array, keep_bg: Array, length: int) -> jax.Array:
    """Bool ``[b, g, r]``: the tokens that are part of the loss."""
    return (jnp.arange(length) < jnp.asarray(lengths_bg)[..., None]) & jnp.asarray(keep_bg)[..., None]


def counted(batch: UpdateBatch) -> Counts:
    """The ``Counts`` of a batch, each at least 1."""
    mask = token_mask(batch.rollout.length_bg, batch.keep_bg, batch.rollout.tokens_bgr.shape[-1])
    return Counts(*(jnp.maximum(n, 1).astype(jnp.float32) for n in (mask.sum(), mask.any(axis=-1).sum())))


def loss_mean(loss_bgr: jax.Array, mask_bgr: jax.Array, counts: Counts, loss_config: LossConfig) -> jax.Array:
    """These tokens' share of the mean over ``counts``; ``grpo.loss_mean`` selects the kind of mean."""
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
    """The loss of some prefix groups, as their share of the mean over ``counts``.

    Summed over micro-batches this is the mean over the whole batch, independent of the micro-batch size.

    Returns:
      The share of the loss, and shares of means over tokens: ``entropy``, ``clip_fraction``, ``sampler_gap`` (mean
      absolute difference between the log-probabilities of the sampler and of a training pass of the same policy),
      ``kl`` if there is a reference, and ``kl_old``, KL(sampling policy || current policy), if the two differ.
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
        # Truncated importance sampling: the tokens came from the sampler's distribution, not the trainer's.
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
    """``params`` themselves if they are a whole policy, else ``base`` with them as its adapters."""
    if isinstance(params, Policy):
        return params
    assert base is not None, "adapters are on something"
    return adapt(base, params, loss_config.lora_scale)


def learning_rate(config: TrainConfig, done: int | jax.Array) -> float | jax.Array:
    """The rate of the update that follows ``done`` others: ``lr`` after a linear warm-up, decayed by ``lr_decay``."""
    rate: float | jax.Array = config.lr
    if config.warmup_steps:
        rate = rate * jnp.minimum(1.0, (done + 1) / config.warmup_steps)
    if config.lr_decay != "none":
        left = jnp.clip((config.decay_steps - done) / (config.decay_steps - config.warmup_steps), 0.0, 1.0)
        rate = rate * (left if config.lr_decay == "linear" else (1 - jnp.cos(jnp.pi * left)) / 2)
    return rate


def make_optimizer(config: TrainConfig, freeze_vision: bool) -> optax.GradientTransformation:
    """AdamW after a global-norm clip; a frozen vision tower has neither moments nor weight decay."""
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
    """``[b, ...]`` to ``[parts, b / parts, ...]``: part i is rows i, i + parts, ..., so every shard keeps its own."""
    rows, *others = jax.typeof(x).sharding.spec
    # Explicit, because when several mesh axes shard the rows, inference may assign one of them to the parts.
    spec = jax.sharding.PartitionSpec(rows, None, *others)
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:]), out_sharding=spec), 1, 0)


def _part_of(split: jax.Array, index: int | jax.Array) -> jax.Array:
    """One part of the result of ``_split_rows``."""
    # Explicit too: jax 0.12 loses the sharding of a part that holds a single number.
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
    """Gradients of the loss of all groups, accumulated over micro-batches, then clipping and AdamW.

    If the loss or the gradient norm is not finite, the new state equals the old one, bit for bit.

    Args:
      state: donated.
      micro_batches: number of parts that the batch is processed in; the result does not depend on it.
      base: the policy that the state's adapters are applied to; None when all weights are trained.

    Returns:
      The new state and float32 scalars: ``loss`` and the means of ``group_loss``, ``grad_norm`` before clipping, and
      ``update/skipped``, 1 if the state was kept.
    """
    counts = counted(batch)
    # Here blocks keep residuals for the backward pass, which a loop on a GPU would copy; with remat they are few.
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
    # The norm is finite only if every gradient is.
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
    """The updates of one rollout: ``grpo.iterations`` passes over the batch, one update per mini-batch.

    A mini-batch without a response in the loss is skipped: neither momentum nor weight decay should move the policy.

    Args:
      state: donated.
      batch: with ``old_logps_bgr`` if there is more than one update.
      keep_bg: ``batch.keep_bg`` on the host.
      mini_batches: number of parts that the batch is split into, one update each; groups stay whole.
      micro_batches, base: see ``update``; ``micro_batches`` is per mini-batch.

    Returns:
      The new state and the metrics of each update.
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
            # Wait for each update: otherwise all queued parts would be in memory together.
            metrics.append(jax.block_until_ready(measured))
    return state, metrics


@partial(jax.jit, static_argnames=("fwd", "loss_config"))
def policy_logps(
    policy: Policy, prompts: PromptBatch, tokens_bgr: Array, *, fwd: ForwardConfig, loss_config: LossConfig
) -> jax.Array:
    """Log-probabilities of the responses under a policy that is not being updated, float32 ``[b, g, r]``."""
    hidden = group_hidden(policy, prompts, tokens_bgr, fwd)
    return response_logps(policy, hidden, tokens_bgr, fwd, loss_config.temperature, loss_config.banned_ids)[0]


def initial_state(params: Policy | Adapters, optimizer: optax.GradientTransformation) -> TrainState:
    """The initial state, made in one program so that ``update`` compiles once for it and all later states."""
    return TrainState(params, *jax.jit(lambda params: (optimizer.init(params), jnp.int32(0)))(params))
