"""From responses to rewards: parses texts, sends their prompts to SAM 2 at once, and combines the scores later."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import numpy as np
from pydantic import TypeAdapter

from segzero_jax import rewards
from segzero_jax.config import RewardConfig
from segzero_jax.frames import rescale_object
from segzero_jax.own_rewards import Answer, RewardFunction, measure
from segzero_jax.patience import Patience
from segzero_jax.pending_scores import PendingScores
from segzero_jax.pods import ALONE, Pod
from segzero_jax.prompt import parse_answer, seg_zero_solution_text, solution_text
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import CandidateScore, ScoreRequest
from segzero_jax.types import Example, Frame, Lengths, ObjectPrompt


@dataclass(frozen=True)
class Scored:
    """The scores of a batch, ``[b][g]``.

    Attributes:
      rewards_bg: float64 totals, NaN where a mask score is missing, or the recipe cannot compare with the target.
      components: raw components of each response, by name; empty where the reward is missing.
      masks: SAM 2's scores; None without a server.
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
    """The objects that a response asks to segment, in pixels of the stored image."""
    return tuple(rescale_object(obj, frame, example.frame) for obj in parse_answer(text).objects)


@dataclass(frozen=True)
class _Part:
    """The share of one host of several: some rows of ``Scored``, by number; None for a missing reward."""

    rewards: dict[int, list[float | None]]
    components: dict[int, list[dict[str, float]]]
    masks: dict[int, list[CandidateScore]] | None


_PART = TypeAdapter(_Part)


class Scorer:
    """Scores responses by a recipe, with masks if there is a client. With several hosts, each scores its share."""

    def __init__(
        self,
        config: RewardConfig,
        frame: Frame,
        client: RewardClient | None,
        pod: Pod = ALONE,
        functions: Mapping[str, RewardFunction] = MappingProxyType({}),
    ):
        """``functions`` are called in addition to the recipe, see ``own_rewards.py``."""
        self._functions = functions
        self._config = config
        self._frame = frame
        self._client = client
        self._pod = pod

    def send(
        self,
        examples: Sequence[Example],
        texts: Sequence[Sequence[str]],
        masks: int = 0,
        rows: Sequence[int] | None = None,
        lengths: Lengths | None = None,
    ) -> "PendingRewards":
        """Sends one call per prompt and returns at once.

        Args:
          examples: ``b`` examples, the same on all hosts.
          texts: responses, ``[b][g]``.
          masks: for this many of the first prompts, also return the predicted masks.
          rows: the prompts that this host scores, in ascending order; by default every n-th with n hosts.
          lengths: lengths of all texts, for custom reward functions.
        """
        own = range(self._pod.index, len(examples), self._pod.count) if rows is None else rows
        masks = sum(row < masks for row in own)
        examples, texts = [examples[row] for row in own], [texts[row] for row in own]
        if lengths is not None:
            lengths = Lengths(*(np.asarray(each)[list(own)] for each in lengths))
        pending = None
        if self._client is not None:
            requests = [
                ScoreRequest(
                    id=example.id,
                    image=example.image,
                    frame=example.frame,
                    target=example.mask if example.mask is not None else example.objects,
                    candidates=tuple(answered_objects(text, example, self._frame) for text in group),
                    ignore=example.ignore,
                )
                for example, group in zip(examples, texts, strict=True)
            ]
            pending = self._client.score(requests, masks)
        recipe = self._config.recipe
        solutions = [
            solution(example, self._frame, recipe) if rewards.can_compare(recipe, len(example.objects)) else None
            for example in examples
        ]
        return PendingRewards(
            self._config, self._frame, self._functions, own, examples, texts, lengths, solutions, pending, self._pod
        )


@dataclass(frozen=True)
class PendingRewards:
    """Rewards whose masks are being scored.

    Attributes:
      rows: rows of the whole batch that ``examples``, ``texts``, ``lengths``, ``solutions`` and ``pending`` are for.
      solutions: None for a target that the recipe cannot compare with.
    """

    config: RewardConfig
    frame: Frame
    functions: Mapping[str, RewardFunction]
    rows: Sequence[int]
    examples: Sequence[Example]
    texts: Sequence[Sequence[str]]
    lengths: Lengths | None
    solutions: Sequence[str | None]
    pending: PendingScores | None
    pod: Pod

    def result(self, patience: Patience | None = None, drop: bool = False) -> Scored:
        """The scores of the whole batch, combined from all hosts' shares.

        Waits for SAM 2, as ``PendingScores.result`` does; an absent score is missing, never a zero.
        """
        mine = self._score(patience, drop)
        if self.pod.count == 1:
            return mine
        say = patience.finish if patience is not None else partial(self.pod.exchange, "scores")
        parts = [_PART.validate_json(said) for said in say(_PART.dump_json(self._part(mine)).decode())]
        return _whole(parts)

    def _part(self, mine: Scored) -> _Part:
        rewards = [[float(x) if np.isfinite(x) else None for x in group] for group in mine.rewards_bg]
        by_row = lambda values: dict(zip(self.rows, values, strict=True))  # noqa: E731
        masks = None if mine.masks is None else by_row(mine.masks)
        return _Part(by_row(rewards), by_row(mine.components), masks)

    def _score(self, patience: Patience | None, drop: bool) -> Scored:
        masks = self._masks(patience, drop)
        weight = self.config.mask_iou_weight if masks is not None else 0.0
        recipe_needs_mask = "mask_iou" in rewards.component_names(self.config.recipe, weight > 0)
        needs_mask = recipe_needs_mask or (masks is not None and bool(self.functions))
        totals = np.full((len(self.texts), len(self.texts[0]) if self.texts else 0), np.nan)
        components: list[list[dict[str, float]]] = []
        for b, (group, target) in enumerate(zip(self.texts, self.solutions, strict=True)):
            row: list[dict[str, float]] = []
            for g, text in enumerate(group):
                iou = masks[b][g].iou if masks is not None else None
                if target is None or (needs_mask and iou is None):
                    # A missing score is never a zero: the response is left out of the loss and counted.
                    row.append({})
                    continue
                score = rewards.score(self.config.recipe, text, target, iou, weight, self.config.mask_iou_mode)
                own = self._measure_own(b, g, iou)
                totals[b, g] = score.total + sum(own.values())
                row.append(score.components | own)
            components.append(row)
        return Scored(totals, components, masks)

    def _measure_own(self, b: int, g: int, mask_iou: float | None) -> dict[str, float]:
        """The components from custom reward functions."""
        if not self.functions:
            return {}
        assert self.lengths is not None, "functions of one's own are told how long a response is"
        text, example = self.texts[b][g], self.examples[b]
        objects = answered_objects(text, example, self.frame)
        tokens, finished = int(self.lengths.length_bg[b, g]), bool(self.lengths.finished_bg[b, g])
        return measure(self.functions, Answer(text, example, objects, mask_iou, tokens, finished))

    def _masks(self, patience: Patience | None, drop: bool) -> list[list[CandidateScore]] | None:
        if self.pending is None:
            return None
        answers = self.pending.result(patience, drop)
        # An unreadable answer asks for no mask, and no mask is right if there is no target: it must not earn what
        # "nothing here" earns.
        return [
            [
                score if parse_answer(text).readable or score.iou is None else replace(score, iou=0.0, intersection=0)
                for score, text in zip(row, group, strict=True)
            ]
            for row, group in zip(answers, self.texts, strict=True)
        ]


def _whole(parts: Sequence[_Part]) -> Scored:
    """The rows of all hosts, in order."""
    rewards = {row: group for part in parts for row, group in part.rewards.items()}
    components = {row: group for part in parts for row, group in part.components.items()}
    masks = {row: group for part in parts for row, group in (part.masks or {}).items()}
    rows = sorted(rewards)
    return Scored(
        rewards_bg=np.array([rewards[row] for row in rows], np.float64),
        components=[components[row] for row in rows],
        masks=None if parts[0].masks is None else [masks[row] for row in rows],
    )
