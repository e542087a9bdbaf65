"""The output of a step: its line of ``metrics.jsonl``, its rows of ``rollouts/STEP.jsonl``; and a run's summary."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from segzero_jax import jsonl
from segzero_jax.answers import thinking
from segzero_jax.config import Config
from segzero_jax.dynamic_sampling import SampledBatch, Selection
from segzero_jax.evaluation import mask_row, object_rows
from segzero_jax.grpo import UPDATE_METRICS, advantages
from segzero_jax.intervals import with_interval
from segzero_jax.report.evaluations import measure
from segzero_jax.report.run import ENDS
from segzero_jax.rewards import component_names, thinks
from segzero_jax.scoring import Scored, answered_objects, solution
from segzero_jax.step_phases import STEP_TIMES
from segzero_jax.terminal import lasting
from segzero_jax.types import Example, Frame, Rollout
from segzero_jax.watch import ALARMS

_BATCHES, _GROUPS = "dynamic_sampling/batches", "dynamic_sampling/groups"
# Prompts per step that are stored with image and masks.
PICTURED_PROMPTS = 1


class StepRecord(NamedTuple):
    """One step's prompts, responses and scores, on the host: all batches that were sampled for it.

    Attributes:
      step: its number, from 1.
      examples: ``b`` prompts.
      texts: responses, ``[b][g]``.
      rollout: their tokens, as numpy arrays.
      scored: their rewards.
      advantages_bg: the advantages in the update; 0 for responses that were not used.
    """

    step: int
    examples: Sequence[Example]
    texts: list[list[str]]
    rollout: Rollout
    scored: Scored
    advantages_bg: np.ndarray


def record_step(step: int, sampled: Sequence[SampledBatch], selection: Selection) -> StepRecord:
    """The batches sampled for a step, as one record."""
    masks = [batch.scored.masks for batch in sampled]
    scored = Scored(
        np.concatenate([batch.scored.rewards_bg for batch in sampled]),
        [group for batch in sampled for group in batch.scored.components],
        None if masks[0] is None else [group for part in masks for group in part or ()],
    )
    advantages_bg = np.concatenate([batch.advantages_bg for batch in sampled])
    return StepRecord(
        step,
        [example for batch in sampled for example in batch.examples],
        [group for batch in sampled for group in batch.texts],
        Rollout(*map(np.concatenate, zip(*(batch.rollout for batch in sampled), strict=True))),
        scored,
        np.where(selection.used[:, None], advantages_bg, 0.0),
    )


def step_metrics(record: StepRecord, config: Config) -> dict[str, float | int | None]:
    """Rewards, lengths and mask IoU of a step; None where no response has a score.

    ``empty_thinking`` is only measured if the recipe asks for reasoning. With several data sets, each has its own mean
    reward.
    """
    totals = record.scored.rewards_bg
    present = totals[np.isfinite(totals)]
    rows = [row for group in record.scored.components for row in group if row]
    metrics: dict[str, float | int | None] = {
        "reward/mean": float(present.mean()) if present.size else None,
        "reward/std": float(present.std()) if present.size else None,
        **{f"reward/{name}": float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())},
        "reward/zero_std_groups": float((advantages(totals) == 0).all(axis=1).mean()),
        **{_reward_of(name): _mean_of(name, record) for name in _mixed(config)},
        "missing_scores": int(totals.size - present.size),
        "response_length/mean": float(record.rollout.length_bg.mean()),
        "response_length/min": int(record.rollout.length_bg.min()),
        "response_length/max": int(record.rollout.length_bg.max()),
    }
    if thinks(config.reward.recipe):
        empty = [not (thinking(text) or "").strip() for row in record.texts for text in row]
        metrics["empty_thinking"] = float(np.mean(empty))
    metrics["finished"] = float(record.rollout.finished_bg.mean())
    if record.scored.masks is not None:
        ious = [score.iou for group in record.scored.masks for score in group if score.iou is not None]
        metrics["mask_iou/mean"] = float(np.mean(ious)) if ious else None
    return metrics


def _mixed(config: Config) -> list[str]:
    """The data sets that a run trains on, if there are several; else empty."""
    names = list(dict.fromkeys(config.data.names))
    return names if len(names) > 1 else []


def _reward_of(data_set: str) -> str:
    return f"data/{data_set}/reward"


def _mean_of(data_set: str, record: StepRecord) -> float | None:
    """The mean reward of the questions from a data set; None if none of them has a score."""
    rewards = record.scored.rewards_bg[[example.data_set == data_set for example in record.examples]]
    present = rewards[np.isfinite(rewards)]
    return float(present.mean()) if present.size else None


def sampling_metrics(sampled: Sequence[SampledBatch], selection: Selection) -> dict[str, int]:
    """The metrics of dynamic sampling in a step."""
    return {_BATCHES: len(sampled), _GROUPS: int(selection.used.sum())}


def metric_keys(config: Config) -> list[str]:
    """The keys of every line of ``metrics.jsonl``, except the step's number and times outside the steps."""
    scored = config.reward.server != "none"
    own = [name.rpartition(":")[2] for name in config.reward.functions]
    components = (*component_names(config.reward.recipe, scored and config.reward.mask_iou_weight > 0), *own)
    measured = {"kl": config.grpo.kl_coef > 0, "kl_old": config.updates_per_rollout > 1}
    updates = [name for name in UPDATE_METRICS if measured.get(name, True)]
    return [
        *("reward/mean", "reward/std", *(f"reward/{name}" for name in components), "reward/zero_std_groups"),
        *(_reward_of(name) for name in _mixed(config)),
        *("missing_scores", *(("mask_iou/mean",) if scored else ())),
        *("response_length/mean", "response_length/min", "response_length/max"),
        *(("empty_thinking",) if thinks(config.reward.recipe) else ()),
        "finished",
        *((_BATCHES, _GROUPS) if config.rollout.max_batches > 1 else ()),
        *(*updates, "lr", "checkpoint/failed", *ALARMS, *(f"time/{name}" for name in STEP_TIMES), "tokens_per_second"),
    ]


def update_metrics(updates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The metrics of a step's updates, on the host: means over updates that were made, None if none was.

    ``update/skipped`` counts the others: a loss can be finite when its gradient is not.
    """
    numbers: dict[str, float | None] = {}
    made = [update for update in updates if not update["update/skipped"]]
    for name in updates[0] if updates else ():
        numbers[name] = sum(float(update[name]) for update in made) / len(made) if made else None
    return numbers | ({"update/skipped": float(len(updates) - len(made))} if updates else {})


def unscored_groups(scored: Scored) -> str:
    """One line on groups without any score, which are left out of the loss; empty if there are none."""
    unscored = ~np.isfinite(scored.rewards_bg).any(axis=1)
    if not unscored.any() or scored.masks is None:
        return ""
    count, total = int(unscored.sum()), len(unscored)
    reason = scored.masks[int(unscored.argmax())][0].error
    if count == total:
        return f"this step makes no update, its groups have no scores: {reason}"
    return f"{count} of {total} groups are left out, they have no scores: {reason}"


def why_no_update(sampled: Sequence[SampledBatch]) -> str:
    """One line on why a step made no update; empty if that is for lack of scores."""
    rewards_bg = np.concatenate([batch.scored.rewards_bg for batch in sampled])
    if not np.isfinite(rewards_bg).any():
        return ""
    if not any(batch.keep_bg.any() for batch in sampled):
        why = "all scored responses were cut off"
    elif (advantages(rewards_bg) == 0).all():
        why = "no group has any spread of rewards"
    else:
        why = "all groups with a spread of rewards were cut off"
    return f"this step makes no update, {why}"


def rollout_rows(
    record: StepRecord, frame: Frame, recipe: str, store_image: Callable[[str, bytes], str]
) -> Iterator[dict[str, Any]]:
    """A row per response; those of the first PICTURED_PROMPTS also have what is needed to draw them.

    Args:
      frame: the frame that the policy answers in.
      recipe: decides the form of ``solution``.
      store_image: ``(id, bytes) -> path`` in the run directory.
    """
    for b, example in enumerate(record.examples):
        target = solution(example, frame, recipe)
        image = store_image(example.id, example.image) if b < PICTURED_PROMPTS else ""
        for g, text in enumerate(record.texts[b]):
            score = record.scored.masks[b][g] if record.scored.masks is not None else None
            reward = float(record.scored.rewards_bg[b, g])
            row: dict[str, Any] = {
                "step": record.step,
                "id": example.id,
                "sample": g,
                "question": example.question,
                "text": text,
                "solution": target,
                "reward": reward if math.isfinite(reward) else None,
                "components": record.scored.components[b][g],
                "mask_iou": score.iou if score else None,
                "error": score.error if score else "",
                "length": int(record.rollout.length_bg[b, g]),
                "finished": bool(record.rollout.finished_bg[b, g]),
                "advantage": float(record.advantages_bg[b, g]),
            }
            if b < PICTURED_PROMPTS:
                row |= {
                    "image": image,
                    "frame": [example.frame.width, example.frame.height],
                    "objects": object_rows(answered_objects(text, example, frame)),
                    "target_objects": object_rows(example.objects),
                    "mask": mask_row(score.mask if score else None),
                    "target_mask": mask_row(example.mask),
                }
            yield row


def print_summary(run_dir: Path) -> None:
    """Prints the reward and the held-out numbers at both ends of a run, as far as steps have lines."""
    console = Console(file=lasting(sys.stdout), highlight=False)
    metrics = jsonl.read(run_dir / "metrics.jsonl")
    scored = [row for row in metrics if row["reward/mean"] is not None]
    # At most half of the steps, so that no step is in both ends.
    ends = min(ENDS, len(scored) // 2)
    if scored:
        parts = (scored[:ends], scored[-ends:]) if ends else (scored,)
        console.print(f"mean reward: {', '.join(map(_mean, parts))}")
    evaluations = jsonl.read(run_dir / "evaluations.jsonl") if (run_dir / "evaluations.jsonl").exists() else []
    if not evaluations:
        return
    steps = sorted({row["step"] for row in evaluations})
    key, name = measure(evaluations)
    table = Table(title=f"held-out {name} [95% interval]")
    before = f"after {steps[0]} steps" if steps[0] else "before"
    for heading in ("split", "answers", before, f"after {steps[-1]} steps"):
        table.add_column(heading)
    by_key = {(row["step"], row["split"], row["mode"]): row for row in evaluations}
    for split, mode in dict.fromkeys((row["split"], row["mode"]) for row in evaluations):
        first, last = (by_key.get((step, split, mode)) for step in (steps[0], steps[-1]))
        if first and last and first.get("count") != last.get("count"):
            first = None  # About other questions, since ``eval.examples`` has changed.
        table.add_row(split, mode, _interval(first, key), _interval(last, key))
    console.print(table)


def _mean(rows: Sequence[Mapping[str, Any]]) -> str:
    values = [row["reward/mean"] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.3f} in step {rows[0]['step']}"
    error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return f"{float(np.mean(values)):.3f} ± {error:.3f} in steps {rows[0]['step']} to {rows[-1]['step']}"


def _interval(row: Mapping[str, Any] | None, key: str) -> str:
    if row is None or row[key] is None:
        return "-"
    return with_interval(row, key)
