"""GRPO: ``draw`` and ``train`` read as the algorithm.

For every batch of prompts: sample G responses each, send their prompts to SAM 2, run the reference policy while SAM 2
works, turn rewards into advantages relative to the group, learn from them.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from segzero_jax.data.batches import Batches
from segzero_jax.dynamic_sampling import Draw, Groups, Learnt, choose, enough, take, whole
from segzero_jax.grpo import TrainState, UpdateBatch, advantages, learn, learning_rate, policy_logps
from segzero_jax.job import Job
from segzero_jax.keeper import Keeper
from segzero_jax.metrics import MetricsWriter
from segzero_jax.model.policy import Policy, embed_images
from segzero_jax.patience import Patience
from segzero_jax.preemption import Preemption
from segzero_jax.record import (
    PICTURED_PROMPTS,
    rollout_rows,
    sampling_metrics,
    step_metrics,
    step_of,
    unlearnt,
    unscored_groups,
    update_metrics,
)
from segzero_jax.rollout import padding_multiple, sample
from segzero_jax.run_dir import checkpoint_due, evaluation_due
from segzero_jax.scoring import Scorer
from segzero_jax.types import Example, Lengths, PromptBatch, Rollout
from segzero_jax.watch import Watch

_TRAIN_KEY = 0
# Of a step's further batches; what is below is for tokens.
_DRAW_KEY = 2**31

# (step, weights in rollout layout)
Evaluation = Callable[[int, Policy], None]


def _crop(rollout: Rollout, longest: int) -> Rollout:
    """Cuts the padding that not even the longest response needs, to one of few static lengths."""
    limit = rollout.tokens_bgr.shape[-1]
    multiple = padding_multiple(limit)
    length = min(limit, -(-longest // multiple) * multiple)
    return rollout._replace(tokens_bgr=rollout.tokens_bgr[..., :length], logps_bgr=rollout.logps_bgr[..., :length])


def draw(
    job: Job,
    state: TrainState,
    reference: Policy | None,
    batches: Batches[tuple[list[Example], PromptBatch]],
    scorer: Scorer,
    keeper: Keeper,
    writer: MetricsWriter,
    preemption: Preemption,
    watch: Watch,
    step: int,
    before: int,
) -> tuple[Draw, Groups]:
    """The next batch, sampled and scored; the reference policy runs while SAM 2 works.

    Args:
      before: batches that were drawn for this step before.
    """
    config, policy = job.config, job.policy(state)
    with watch.phase("data"):
        mine, encoded = next(batches)
        prompts = job.join(encoded)
        examples = job.share(mine)
    with watch.phase("rollout"):
        if config.model.vision_stays:
            # Policy and reference share the tower, and it never changes: once for rollout, reference and update.
            prompts = embed_images(policy, prompts, setup=job.train_pass)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _TRAIN_KEY), step)
        if before:
            key = jax.random.fold_in(key, _DRAW_KEY + before)
        # The copy in rollout layout lives no longer than the call.
        rollout = sample(job.to_rollout(policy), prompts, key, setup=job.rollout_pass, sampling=job.sampling)
        said = job.fetch(rollout)
        texts = job.texts(said)
    preemption.check()
    lengths = Lengths(said.length_bg, said.finished_bg)
    pending = scorer.send(examples, texts, 0 if before else PICTURED_PROMPTS, job.rows.own, lengths)
    with watch.phase("reference"):
        rollout = _crop(rollout, int(said.length_bg.max()))
        setup = job.train_pass._replace(remat=False)
        logps_of = partial(policy_logps, prompts=prompts, tokens_bgr=rollout.tokens_bgr, setup=setup, settings=job.loss)
        ref_logps = None if reference is None else logps_of(reference)
        # A single update starts from the policy that sampled: its own log-probabilities are the old ones.
        old_logps = None if config.updates_per_rollout == 1 else logps_of(policy)
        jax.block_until_ready((ref_logps, old_logps))
    with (
        watch.phase("reward_wait"),
        Patience(config.reward, writer.message, keeper.keep, preemption.check, job.pod) as patience,
    ):
        scored = pending.result(patience, drop=config.reward.missing == "drop")
    preemption.check()
    keep_bg = np.isfinite(scored.rewards_bg) & (said.finished_bg | (not config.grpo.mask_truncated))
    advantages_bg = np.where(keep_bg, advantages(scored.rewards_bg, config.grpo.norm_adv_by_std), 0.0)
    groups = Groups(prompts, rollout, ref_logps, old_logps)
    tokens = int(prompts.length_b.sum()) + int(said.length_bg.sum())
    return Draw(examples, texts, said, scored, advantages_bg, keep_bg, tokens), groups


def _learn_from(
    job: Job, state: TrainState, drawn: list[Groups], learnt: Learnt
) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
    """The updates of a step, and the numbers of each. Empties ``drawn``."""
    train = job.config.train
    groups = take(drawn, learnt.rows_b, job.processor.pad_id)
    advantages_bg, keep_bg = job.place((learnt.advantages_bg, learnt.keep_bg), range(train.batch_size))
    batch = UpdateBatch(
        groups.prompts, groups.rollout, advantages_bg, keep_bg, groups.ref_logps_bgr, groups.old_logps_bgr
    )
    # Pictures take memory that the update, and the next rollout, may need.
    drawn.clear()
    del groups
    state, losses = learn(
        state,
        batch,
        learnt.keep_bg,
        optimizer=job.optimizer,
        setup=job.train_pass,
        settings=job.loss,
        mini_batches=train.mini_batches,
        micro_batches=train.micro_batches,
        base=job.base,
    )
    return state, jax.device_get(losses)


def train(
    job: Job,
    state: TrainState,
    reference: Policy | None,
    batches: Batches[tuple[list[Example], PromptBatch]],
    scorer: Scorer,
    keeper: Keeper,
    writer: MetricsWriter,
    evaluate: Evaluation,
    preemption: Preemption,
    watch: Watch,
    first_step: int,
) -> TrainState:
    """GRPO from ``first_step`` to ``train.steps``. Raises Stopped between phases; ``keeper`` has the last step."""
    config = job.config
    for step in range(first_step, config.train.steps + 1):
        preemption.check()
        watch.begin(step)
        draws: list[Draw] = []
        drawn: list[Groups] = []
        while not draws or (len(draws) < config.rollout.max_batches and not enough(draws)):
            scores, groups = draw(
                job, state, reference, batches, scorer, keeper, writer, preemption, watch, step, len(draws)
            )
            draws.append(scores)
            drawn.append(groups)
            del groups
        with watch.phase("update"):
            learnt = whole(draws[0]) if config.rollout.max_batches == 1 else choose(draws)
            state, losses = _learn_from(job, state, drawn, learnt)
        keeper.finished(step, state, batches.get_state())
        made = step_of(step, draws, learnt)
        for line in (unscored_groups(made.scored), "" if losses else unlearnt(draws)):
            if line:
                writer.message(f"step {step}: {line}")
        # Of the step's last update.
        lr = float(learning_rate(config.train, max(int(state.updates), 1) - 1))
        numbers = {
            **step_metrics(made, config),
            **update_metrics(losses),
            **{"lr": lr, "checkpoint/failed": keeper.failed},
        }
        if config.rollout.max_batches > 1:
            numbers |= sampling_metrics(draws, learnt)
        tokens = sum(scores.tokens for scores in draws)
        writer.write_step(step, {**numbers, **watch.line(step, numbers, tokens)})
        writer.write_rollouts(step, rollout_rows(made, job.frame, config.reward.recipe, writer.write_image))
        watch.check(step, numbers)
        if checkpoint_due(config, step):
            with watch.phase("checkpoint"):
                keeper.save()
        if evaluation_due(config, step):
            with watch.phase("evaluation"):
                evaluate(step, job.to_rollout(job.policy(state)))
    return state
