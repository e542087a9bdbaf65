"""From responses to rewards: texts are parsed, their prompts sent to SAM 2 at once, and scores put together later."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from segzero_jax import rewards
from segzero_jax.config import RewardConfig
from segzero_jax.frames import rescale_object
from segzero_jax.prompt import parse_answer, seg_zero_solution_text, solution_text
from segzero_jax.reward_client import Listener, PendingScores, RewardClient
from segzero_jax.reward_messages import CandidateScore, ScoreRequest
from segzero_jax.types import Example, Frame, ObjectPrompt


@dataclass(frozen=True)
class Scored:
    """The scores of a batch, ``[b][g]``.

    Attributes:
      rewards_bg: float64 totals, NaN where a mask score is missing.
      components: raw components of each response, by name; empty where the score is missing.
      masks: what SAM 2 said, None without a server.
    """

    rewards_bg: np.ndarray
    components: list[list[dict[str, float]]]
    masks: list[list[CandidateScore]] | None


def solution(example: Example, frame: Frame, recipe: str) -> str:
    """The target as the recipe's text form, in the frame that the policy answers in."""
    objects = [rescale_object(obj, example.frame, frame) for obj in example.objects]
    if recipe.startswith("seg_zero") and len(objects) == 1 and len(objects[0].points) == 2:
        return seg_zero_solution_text(objects[0])
    return solution_text(objects)


def answered_objects(text: str, example: Example, frame: Frame) -> tuple[ObjectPrompt, ...]:
    """What a response asks the segmenter for, in pixels of the stored picture."""
    return tuple(rescale_object(obj, frame, example.frame) for obj in parse_answer(text).objects)


class Scorer:
    """Scores responses by a recipe, with masks where there is a client."""

    def __init__(self, config: RewardConfig, frame: Frame, client: RewardClient | None):
        self._config = config
        self._frame = frame
        self._client = client

    def send(self, examples: Sequence[Example], texts: Sequence[Sequence[str]], masks: int = 0) -> "PendingRewards":
        """Sends one call per prompt and returns at once.

        Args:
          examples: ``b`` of them.
          texts: ``[b][g]``.
          masks: so many of the first prompts bring their predicted masks back too.
        """
        pending = None
        if self._client is not None:
            requests = [
                ScoreRequest(
                    id=example.id,
                    image=example.image,
                    frame=example.frame,
                    target=example.mask if example.mask is not None else example.objects,
                    candidates=tuple(answered_objects(text, example, self._frame) for text in group),
                )
                for example, group in zip(examples, texts, strict=True)
            ]
            pending = self._client.score(requests, masks)
        solutions = [solution(example, self._frame, self._config.recipe) for example in examples]
        return PendingRewards(self._config, texts, solutions, pending)


@dataclass(frozen=True)
class PendingRewards:
    """Rewards whose masks are being scored."""

    config: RewardConfig
    texts: Sequence[Sequence[str]]
    solutions: Sequence[str]
    pending: PendingScores | None

    def result(self, patience: Listener | None = None, drop: bool = False) -> Scored:
        """Waits for SAM 2, as ``PendingScores.result`` does; a score that is not there is missing, never a zero."""
        masks = self._masks(patience, drop)
        weight = self.config.mask_iou_weight if masks is not None else 0.0
        needs_mask = "mask_iou" in rewards.component_names(self.config.recipe, weight > 0)
        totals = np.full((len(self.texts), len(self.texts[0])), np.nan)
        components: list[list[dict[str, float]]] = []
        for b, (group, target) in enumerate(zip(self.texts, self.solutions, strict=True)):
            row: list[dict[str, float]] = []
            for g, text in enumerate(group):
                iou = masks[b][g].iou if masks is not None else None
                if needs_mask and iou is None:
                    # A missing score is never a zero: the response is left out of the loss and counted.
                    row.append({})
                    continue
                score = rewards.score(self.config.recipe, text, target, iou, weight, self.config.mask_iou_mode)
                totals[b, g] = score.total
                row.append(score.components)
            components.append(row)
        return Scored(totals, components, masks)

    def _masks(self, patience: Listener | None, drop: bool) -> list[list[CandidateScore]] | None:
        if self.pending is None:
            return None
        answers = self.pending.result(patience, drop)
        # An answer that cannot be read asks for nothing, and nothing is the right mask where there is no target:
        # it must not earn what "nothing here" earns.
        return [
            [
                score
                if parse_answer(text).well_formed or score.iou is None
                else replace(score, iou=0.0, intersection=0)
                for score, text in zip(row, group, strict=True)
            ]
            for row, group in zip(answers, self.texts, strict=True)
        ]
