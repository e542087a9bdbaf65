"""The main job: ``python -m segzero_jax.train --mesh=4x4``. ``train`` reads as the algorithm.

For every batch of prompts: sample G responses each, send their prompts to SAM 2, run the reference policy while SAM 2
works, turn rewards into advantages relative to the group, update.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from segzero_jax import config as configs
from segzero_jax import evaluation
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config, ConfigError
from segzero_jax.data.pipeline import DataError, open_split, split_name, training_batches
from segzero_jax.grpo import (
    TrainState,
    UpdateBatch,
    advantages,
    reference_logps,
    update,
)
from segzero_jax.job import Job, answer, prepare
from segzero_jax.mesh import MeshError, make_mesh, parse_mesh, prepare_cpu
from segzero_jax.metrics import MetricsError, MetricsWriter, PhaseTimer
from segzero_jax.model.policy import Policy, embed_images
from segzero_jax.model.weights import CheckpointError
from segzero_jax.patience import Patience
from segzero_jax.processor import ImageError, PromptTooLong
from segzero_jax.record import DRAWN_PROMPTS, Step, print_summary, rollout_rows, step_metrics, unscored_groups
from segzero_jax.report import write_report
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway, read_access
from segzero_jax.reward_service import reward_service
from segzero_jax.rollout import padding_multiple, sample
from segzero_jax.run_dir import has_evaluation, open_run, split_label
from segzero_jax.scoring import Scorer
from segzero_jax.types import Example, Rollout

# What a user can get wrong; anything else is a bug and keeps its traceback.
USER_ERRORS = (
    ConfigError,
    DataError,
    MeshError,
    CheckpointError,
    MetricsError,
    ImageError,
    PromptTooLong,
    RewardServerError,
)
_TRAIN_KEY = 0

# Saves the last finished step, from which --resume repeats what was interrupted.
Save = Callable[[], None]
Evaluation = Callable[[int, Policy, Save], None]


def _crop(rollout: Rollout, longest: int) -> Rollout:
    """Cuts the padding that not even the longest response needs, to one of few static lengths."""
    limit = rollout.tokens_bgr.shape[-1]
    multiple = padding_multiple(limit)
    length = min(limit, -(-longest // multiple) * multiple)
    return rollout._replace(tokens_bgr=rollout.tokens_bgr[..., :length], logps_bgr=rollout.logps_bgr[..., :length])


def train(
    job: Job,
    state: TrainState,
    reference: Policy,
    batches: grain.DatasetIterator[list[Example]],
    scorer: Scorer,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    evaluate: Evaluation,
    first_step: int,
) -> TrainState:
    """GRPO from ``first_step`` to ``train.steps``."""
    config, timer = job.config, PhaseTimer()
    micro_batches = config.train.batch_size // config.train.micro_batch_size
    for step in range(first_step, config.train.steps + 1):
        save = partial(save_and_wait, checkpoints, step - 1, state, batches.get_state(), config)
        with timer.phase("data"):
            examples = next(batches)
            prompts = job.encode(examples)
        with timer.phase("rollout"):
            if config.model.freeze_vision:
                # Policy and reference share the tower, and it never changes: once for rollout, reference and update.
                prompts = embed_images(state.policy, prompts, setup=job.train_pass)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), _TRAIN_KEY), step)
            # The copy in rollout layout lives no longer than the call.
            rollout = sample(job.to_rollout(state.policy), prompts, key, setup=job.rollout_pass, sampling=job.sampling)
            said = jax.device_get(rollout)
            texts = job.texts(said)
        pending = scorer.send(examples, texts, masks=DRAWN_PROMPTS)
        with timer.phase("reference"):
            rollout = _crop(rollout, int(said.length_bg.max()))
            setup = job.train_pass._replace(remat=False)
            ref_logps = reference_logps(reference, prompts, rollout.tokens_bgr, setup=setup, settings=job.loss)
            ref_logps.block_until_ready()
        with timer.phase("reward_wait"), Patience(config.reward, writer.message, save) as patience:
            scored = pending.result(patience, drop=config.reward.missing == "drop")
        unscored = unscored_groups(scored)
        if unscored:
            writer.message(f"step {step}: {unscored}")
        losses: dict[str, Any] = {}
        with timer.phase("update"):
            advantages_bg = advantages(scored.rewards_bg)
            present_bg = np.isfinite(scored.rewards_bg)
            learnt, kept = job.place((advantages_bg, present_bg))
            batch = UpdateBatch(prompts, rollout, learnt, kept, ref_logps)
            # Without any score there is no gradient, and neither momentum nor weight decay should move the policy.
            if present_bg.any():
                state, losses = update(
                    state,
                    batch,
                    optimizer=job.optimizer,
                    setup=job.train_pass,
                    settings=job.loss,
                    micro_batches=micro_batches,
                )
                losses = jax.device_get(losses)
        made = Step(step, examples, texts, said, scored, advantages_bg)
        times = timer.take()
        numbers = {**step_metrics(made), **{name: float(value) for name, value in losses.items()}, **times}
        tokens = int(jax.device_get(prompts.length_b).sum()) + int(said.length_bg.sum())
        writer.write_step(step, {**numbers, "tokens_per_second": tokens / times["time/total"]})
        writer.write_rollouts(step, rollout_rows(made, job.frame, config.reward.recipe, writer.write_image))
        last = step == config.train.steps
        if last or step % config.train.checkpoint_every == 0:
            checkpoints.save(step, state, batches.get_state(), config)
        if evaluation_due(config, step):
            save = partial(save_and_wait, checkpoints, step, state, batches.get_state(), config)
            evaluate(step, job.to_rollout(state.policy), save)
            timer.take()
    return state


def save_and_wait(checkpoints: Checkpoints, step: int, state: TrainState, data: dict[str, Any], config: Config) -> None:
    """Saves the state after ``step``, unless that is done; returns once it is on the disk."""
    checkpoints.save(step, state, data, config)
    checkpoints.wait()


def evaluation_due(config: Config, step: int) -> bool:
    """Whether held-out splits are evaluated after ``step`` updates."""
    return step in (0, config.train.steps) or (config.eval.every > 0 and step % config.eval.every == 0)


def make_evaluation(job: Job, scorer: Scorer, writer: MetricsWriter) -> Evaluation:
    """A function ``(step, rollout weights)`` that evaluates every held-out split and writes what it finds."""
    config = job.config
    splits = {}
    for name in config.data.eval_splits:
        source = open_split(*split_name(name, config.data.name), config.data.dir)
        splits[split_label(name)] = [source[i] for i in range(min(config.eval.examples, len(source)))]

    def evaluate(step: int, weights: Policy, save: Save) -> None:
        for name, examples in splits.items():
            writer.message(f"evaluating {name} after {step} steps: {len(examples)} questions")
            with Patience(config.reward, writer.message, save) as patience:
                summaries, rows = evaluation.evaluate_split(
                    examples,
                    lambda asked, greedy: answer(job, weights, asked, greedy),
                    scorer,
                    job.frame,
                    config.reward.recipe,
                    lambda example: writer.write_image(example.id, example.image),
                    patience,
                )
            writer.write_evaluation(step, name, summaries, rows)

    return evaluate


def run(config: Config, resume: bool) -> None:
    """One run from configuration to report."""
    mesh = make_mesh(config.mesh)
    access = read_access(config.reward)
    if resume and not (Path(config.run.dir).expanduser() / "checkpoints").is_dir():
        raise ConfigError(f"run.dir={config.run.dir}: no checkpoint to resume from; start without --resume")
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        job, state, reference = prepare(config, mesh)
        train_split = open_split(config.data.name, "train", config.data.dir)
        batches = training_batches(train_split, config.train.batch_size, config.seed)
        run_dir = open_run(config, resume)
        checkpoints = stack.enter_context(Checkpoints(run_dir, config.train.keep_checkpoints))
        first_step = 1
        if resume:
            restored = checkpoints.restore(state, config)
            state, first_step = restored.state, restored.step + 1
            batches.set_state(restored.data)
        scorer = Scorer(config.reward, job.frame, stack.enter_context(reward_service(config, access, run_dir)))
        is_first_host = jax.process_index() == 0
        writer = stack.enter_context(MetricsWriter(run_dir, config.train.steps, show_progress=is_first_host))
        evaluate = make_evaluation(job, scorer, writer)
        if resume:
            writer.truncate_after(first_step - 1)
        if evaluation_due(config, first_step - 1) and not has_evaluation(config, run_dir, first_step - 1):
            save = partial(save_and_wait, checkpoints, first_step - 1, state, batches.get_state(), config)
            evaluate(first_step - 1, job.to_rollout(state.policy), save)
        train(job, state, reference, batches, scorer, checkpoints, writer, evaluate, first_step)
        checkpoints.wait()
    print_summary(run_dir)
    print(f"report: {write_report(run_dir)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="segzero_jax.train",
        description="Trains a policy with GRPO; without --config, the toy run.",
        epilog="Exit codes: 0 done; 2 something to put right; 3 the reward service stayed away: --resume goes on; "
        "130 stopped.",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.dir")
    args, config = configs.parse_command_line(parser, argv)
    try:
        data, fsdp, tensor = parse_mesh(config.mesh)
        prepare_cpu(data * fsdp * tensor)
        run(config, args.resume)
    except RewardServiceAway as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 3
    except USER_ERRORS as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; --resume goes on from the last checkpoint in {config.run.dir}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
