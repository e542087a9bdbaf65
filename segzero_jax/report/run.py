"""Reads a run directory, finished or still being written, without touching it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from segzero_jax import jsonl, overlay, rewards

_TIERED = rewards.maximum("vision_reasoner", 1.0, "tiered") - rewards.maximum("vision_reasoner")
ENDS = 10  # number of steps compared at either end


class RunError(ValueError):
    """A folder that cannot be reported on; the message is one line."""


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
      path: the directory.
      name: its name.
      config_text: text of ``config.yaml``.
      config: the same, parsed into nested values.
      metrics: rows of ``metrics.jsonl`` by step.
      evaluations: rows of ``evaluations.jsonl`` by step, in the order of splits in the file.
      sample_steps: by split, the steps whose evaluation wrote individual answers.
      rollout_steps: steps with a rollouts file.
      after_last_line: seconds by phase since the last row of ``metrics``.
    """

    path: Path
    name: str
    config_text: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    sample_steps: Mapping[str, Sequence[int]]
    rollout_steps: Sequence[int]
    after_last_line: Mapping[str, float]

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted configuration key."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def column(self, key: str) -> list[float | None]:
        """One metric over the steps, None where it was not measured."""
        return [number(row.get(key)) for row in self.metrics]

    @cached_property
    def measured(self) -> list[str]:
        """All metrics that at least one step measured, in the order of the file."""
        found = {key: None for row in self.metrics for key, value in row.items() if isinstance(value, int | float)}
        return list(found)

    def samples(self, step: int, split: str) -> list[dict[str, Any]]:
        """The greedy answers of an evaluation."""
        return _rows(self.path / "evaluations" / f"{step}_{split}.jsonl")

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """The responses sampled in a step."""
        return _rows(self.path / "rollouts" / f"{step}.jsonl")

    def picture(self, relative: Any) -> Image.Image | None:
        """An image of the run; None if it is missing, unreadable or outside the run directory."""
        path = (self.path / str(relative)).resolve()
        if not path.is_relative_to(self.path.resolve()) or not path.is_file():
            return None
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, Image.DecompressionBombError):
            return None


def read_run(path: str | Path) -> Run:
    """Reads a run directory.

    Raises:
      RunError: there is no run, or one of its files is invalid.
    """
    folder = Path(path)
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        what = "no config.yaml in it" if folder.is_dir() else "no such folder"
        raise RunError(f"{folder}: {what}; expected a run directory as train writes it, such as runs/toy")
    try:
        text = config_file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{config_file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise RunError(f"{config_file}: expected sections with keys, got {type(config).__name__}")
    metrics = _by_step(folder / "metrics.jsonl")
    return Run(
        path=folder,
        name=folder.resolve().name,
        config_text=text,
        config=config,
        metrics=metrics,
        evaluations=_by_step(folder / "evaluations.jsonl"),
        sample_steps=_sample_steps(folder / "evaluations"),
        rollout_steps=sorted(int(f.stem) for f in (folder / "rollouts").glob("*.jsonl") if f.stem.isdecimal()),
        after_last_line=_after(folder / "clock.json", metrics),
    )


def number(value: Any) -> float | None:
    """A finite number, or None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Maxima:
    """The highest possible rewards.

    Attributes:
      total: maximum of the weighted sum, None if it is not known.
      components: maximum of each component by name, before its weight.
    """

    total: float | None
    components: Mapping[str, float]


def own_rewards(run: Run) -> set[str]:
    """Names of the components that the run's own functions define; no recipe describes these."""
    functions = run.setting("reward.functions")
    return {str(name).rpartition(":")[2] for name in functions} if isinstance(functions, list) else set()


def reward_maxima(run: Run) -> Maxima:
    """The maxima of the configured recipe, including the mask IoU if the run measured it."""
    recipe, mode = run.setting("reward.recipe"), run.setting("reward.mask_iou_mode", "raw")
    weight = number(run.setting("reward.mask_iou_weight")) or 0.0
    measured = any("reward/mask_iou" in row for row in run.metrics)
    try:
        mask = rewards.maximum(recipe, 1.0, mode) - rewards.maximum(recipe, 0.0, mode)
        total = rewards.maximum(recipe, weight if measured else 0.0, mode)
    except ValueError:
        return Maxima(None, {})
    # A recipe with its own mask IoU includes it in both maxima. The maximum of the run's own functions is unknown.
    own = own_rewards(run)
    components = {**rewards.RECIPES[recipe].maxima, "mask_iou": mask or _TIERED}
    return Maxima(None if own else total, {name: most for name, most in components.items() if name not in own})


def thinks(run: Run) -> bool:
    """Whether the configured recipe asks for reasoning; True for an unknown recipe."""
    try:
        return rewards.thinks(run.setting("reward.recipe"))
    except ValueError:
        return True


def masked(run: Run) -> bool:
    """Whether SAM 2 makes masks of the answers; True if the configuration does not specify it."""
    return bool(run.setting("reward.server") != "none")


@dataclass(frozen=True)
class Ends:
    """A metric at the two ends of a run: means over ``window`` steps and their standard errors (None for one step)."""

    window: int
    first: float
    last: float
    first_error: float | None
    last_error: float | None


@np.errstate(over="ignore", invalid="ignore")  # Of numbers near the end of float64; the page shows a dash.
def ends(values: Sequence[float | None]) -> Ends | None:
    """Compares the first and last ten measured steps, or the halves of a shorter run; None if nothing was measured."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    window = max(1, min(ENDS, len(measured) // 2))
    first, last = measured[:window], measured[-window:]
    return Ends(window, float(np.mean(first)), float(np.mean(last)), _standard_error(first), _standard_error(last))


def marks(objects: Any, mask: Any) -> overlay.Marks:
    """The objects and mask of one side of a row, as far as they can be drawn."""
    boxes: list[list[float]] = []
    points: list[list[float]] = []
    for item in objects if isinstance(objects, list) else []:
        if isinstance(item, dict) and _numbers(item.get("box"), 4):
            boxes.append(item["box"])
            points += [point for point in item.get("points") or [] if _numbers(point, 2)]
    try:
        decoded = overlay.decode_mask(mask) if isinstance(mask, dict) else None
    except (ValueError, KeyError, TypeError):
        decoded = None
    return overlay.Marks(boxes, points, decoded)


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(number(item) is not None for item in value)


def _standard_error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return jsonl.read(path)
    except jsonl.JsonLinesError as error:
        raise RunError(str(error)) from None


def _by_step(path: Path) -> list[dict[str, Any]]:
    rows = _rows(path)
    for index, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise RunError(f"{path}:{index}: expected a whole number under 'step', got {row.get('step')!r}")
    return sorted(rows, key=lambda row: row["step"])


def _after(file: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The times in ``clock.json``, unless a metrics line has been written since."""
    if not file.is_file() or not metrics:
        return {}
    try:
        clock = json.loads(file.read_bytes())
    except ValueError as error:
        raise RunError(f"{file}: not JSON: {error}") from None
    if not isinstance(clock, dict) or clock.get("after_step") != metrics[-1]["step"]:
        return {}
    seconds = clock.get("seconds")
    known = {key: number(value) for key, value in seconds.items()} if isinstance(seconds, dict) else {}
    return {key: value for key, value in known.items() if value is not None}


def _sample_steps(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in folder.glob("*_*.jsonl"):
        step, _, split = path.stem.partition("_")
        if step.isdecimal():
            found.setdefault(split, []).append(int(step))
    return {split: sorted(steps) for split, steps in sorted(found.items())}
