"""GRPO: ``Loop.train`` and the methods behind it read as the algorithm.

For every batch of prompts: sample G responses each, send their boxes and points to SAM 2, run the reference policy
while SAM 2 works, turn rewards into group-relative advantages, update.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from segzero_jax.data.batches import Batches
from segzero_jax.dynamic_sampling import DeviceBatch, SampledBatch, Selection, enough, gather, select, select_all
from segzero_jax.grpo import TrainState, UpdateBatch, advantages, learn, learning_rate, policy_logps
from segzero_jax.job import Job
from segzero_jax.keeper import Keeper
from segzero_jax.metrics import MetricsWriter
from segzero_jax.model.policy import Policy, embed_images
from segzero_jax.patience import Patience
from segzero_jax.preemption import Preemption
from segzero_jax.random_streams import TRAINING, stream_key
from segzero_jax.record import (
    PICTURED_PROMPTS,
    StepRecord,
    record_step,
    rollout_rows,
    sampling_metrics,
    step_metrics,
    unscored_groups,
    update_metrics,
    why_no_update,
)
from segzero_jax.rollout import padding_multiple, prefill_prompts, sample
from segzero_jax.run_dir import checkpoint_due, evaluation_due
from segzero_jax.scoring import Scorer
from segzero_jax.types import Example, Lengths, PromptBatch, Rollout
from segzero_jax.watch import Watch

# Key offset for a step's second and later batches: smaller numbers are folded in for token positions.
_BATCH_KEY = 2**31

# (step, weights in rollout layout)
Evaluation = Callable[[int, Policy], None]


def _crop(rollout: Rollout, longest: int) -> Rollout:
    """Cuts the padding beyond the longest response, to one of a few static lengths."""
    limit = rollout.tokens_bgr.shape[-1]
    multiple = padding_multiple(limit)
    length = min(limit, -(-longest // multiple) * multiple)
    return rollout._replace(tokens_bgr=rollout.tokens_bgr[..., :length], logps_bgr=rollout.logps_bgr[..., :length])


@dataclass(frozen=True)
class Loop:
    """The objects that the steps of a run share.

    Attributes:
      reference: the frozen policy that the KL term refers to; None without ``grpo.kl_coef``.
      keeper: saves the last finished step.
      evaluate: measures a policy on the held-out splits.
    """

    job: Job
    reference: Policy | None
    batches: Batches[tuple[list[Example], PromptBatch]]
    scorer: Scorer
    keeper: Keeper
    writer: MetricsWriter
    evaluate: Evaluation
    preemption: Preemption
    watch: Watch

    def train(self, state: TrainState, first_step: int, evaluate_first: bool) -> TrainState:
        """Runs steps ``first_step`` to ``train.steps``. Raises Stopped between phases; ``keeper`` has the last step."""
        config = self.job.config
        if evaluate_first:
            self._evaluate(state, first_step - 1)
        for step in range(first_step, config.train.steps + 1):
            self.preemption.check()
            self.watch.begin(step)
            sampled: list[SampledBatch] = []
            on_devices: list[DeviceBatch] = []
            while not sampled or (len(sampled) < config.rollout.max_batches and not enough(sampled)):
                sampled_batch, device_batch = self._sample(state, step, len(sampled))
                sampled.append(sampled_batch)
                on_devices.append(device_batch)
                del device_batch
            with self.watch.phase("update"):
                selection = select_all(sampled[0]) if config.rollout.max_batches == 1 else select(sampled)
                state, updates = self._update(state, on_devices, selection)
            self.keeper.finished(step, state, self.batches.get_state())
            self._write(record_step(step, sampled, selection), sampled, selection, updates, int(state.num_updates))
            if checkpoint_due(config, step):
                with self.watch.phase("checkpoint"):
                    self.keeper.save()
            if evaluation_due(config, step):
                self._evaluate(state, step)
        return state

    def _sample(self, state: TrainState, step: int, earlier: int) -> tuple[SampledBatch, DeviceBatch]:
        """Samples and scores the next batch; the reference policy runs while SAM 2 works.

        Args:
          earlier: number of batches already sampled for this step.
        """
        job, config, watch, policy = self.job, self.job.config, self.watch, self.job.policy(state)
        with watch.phase("data"):
            own_examples, encoded = next(self.batches)
            prompts = job.join(encoded)
            examples = job.share(own_examples)
        with watch.phase("rollout"):
            if config.model.vision_stays:
                # The policy and the reference share the vision tower, which never changes: one pass serves all phases.
                prompts = embed_images(policy, prompts, fwd=job.train_fwd)
            key = jax.random.fold_in(stream_key(config.seed, TRAINING), step)
            if earlier:
                key = jax.random.fold_in(key, _BATCH_KEY + earlier)
            # Only for the calls: the KV cache of the prompts, and the copy in rollout layout.
            rollout = sample(
                prefilled=prefill_prompts(policy, prompts, fwd=job.train_fwd._replace(remat=False)),
                policy=job.to_rollout(policy),
                batch=prompts,
                key=key,
                fwd=job.rollout_fwd,
                sampling=job.sampling,
            )
            responses = job.fetch(rollout)
            texts = job.texts(responses)
        self.preemption.check()
        lengths = Lengths(responses.length_bg, responses.finished_bg)
        pending = self.scorer.send(examples, texts, 0 if earlier else PICTURED_PROMPTS, job.rows.own, lengths)
        with watch.phase("reference"):
            rollout = _crop(rollout, int(responses.length_bg.max()))
            logps_of = partial(
                policy_logps,
                prompts=prompts,
                tokens_bgr=rollout.tokens_bgr,
                fwd=job.train_fwd._replace(remat=False),
                loss_config=job.loss_config,
            )
            ref_logps = None if self.reference is None else logps_of(self.reference)
            # A single update starts from the policy that sampled: its own log-probabilities are the old ones.
            old_logps = None if config.updates_per_rollout == 1 else logps_of(policy)
            jax.block_until_ready((ref_logps, old_logps))
        with (
            watch.phase("reward_wait"),
            Patience(config.reward, self.writer.message, self.keeper.keep, self.preemption.check, job.pod) as patience,
        ):
            scored = pending.result(patience, drop=config.reward.missing == "drop")
        self.preemption.check()
        keep_bg = np.isfinite(scored.rewards_bg) & (responses.finished_bg | (not config.grpo.mask_truncated))
        advantages_bg = np.where(keep_bg, advantages(scored.rewards_bg, config.grpo.norm_adv_by_std), 0.0)
        tokens = int(prompts.length_b.sum()) + int(responses.length_bg.sum())
        return (
            SampledBatch(examples, texts, responses, scored, advantages_bg, keep_bg, tokens),
            DeviceBatch(prompts, rollout, ref_logps, old_logps),
        )

    def _update(
        self, state: TrainState, on_devices: list[DeviceBatch], selection: Selection
    ) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        """Runs the updates of a step; also returns the metrics of each. Empties ``on_devices``."""
        job, train = self.job, self.job.config.train
        groups = gather(on_devices, selection.rows_b, job.processor.pad_id)
        advantages_bg, keep_bg = job.place((selection.advantages_bg, selection.keep_bg), range(train.batch_size))
        batch = UpdateBatch(
            groups.prompts, groups.rollout, advantages_bg, keep_bg, groups.ref_logps_bgr, groups.old_logps_bgr
        )
        # Images take memory that the update and the next rollout may need.
        on_devices.clear()
        del groups
        state, updates = learn(
            state,
            batch,
            selection.keep_bg,
            optimizer=job.optimizer,
            fwd=job.train_fwd,
            loss_config=job.loss_config,
            mini_batches=train.mini_batches,
            micro_batches=train.micro_batches,
            base=job.base,
        )
        return state, jax.device_get(updates)

    def _evaluate(self, state: TrainState, step: int) -> None:
        with self.watch.phase("evaluation"):
            self.evaluate(step, self.job.to_rollout(self.job.policy(state)))

    def _write(
        self,
        record: StepRecord,
        sampled: list[SampledBatch],
        selection: Selection,
        updates: list[dict[str, np.ndarray]],
        num_updates: int,
    ) -> None:
        """Writes the step's messages, its line of metrics and its responses."""
        config, writer, step = self.job.config, self.writer, record.step
        for line in (unscored_groups(record.scored), "" if updates else why_no_update(sampled)):
            if line:
                writer.message(f"step {step}: {line}")
        # The learning rate of the step's last update.
        lr = float(learning_rate(config.train, max(num_updates, 1) - 1))
        numbers = {
            **step_metrics(record, config),
            **update_metrics(updates),
            **{"lr": lr, "checkpoint/failed": self.keeper.failed},
        }
        if config.rollout.max_batches > 1:
            numbers |= sampling_metrics(sampled, selection)
        tokens = sum(batch.tokens for batch in sampled)
        writer.write_step(step, {**numbers, **self.watch.line(step, numbers, tokens)})
        writer.write_rollouts(step, rollout_rows(record, self.job.frame, config.reward.recipe, writer.write_image))
        self.watch.check(step, numbers)
