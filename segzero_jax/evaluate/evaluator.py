"""Evaluates policies one after another on splits of data sets, with one SAM 2 for all."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from segzero_jax.asking import Loaded, default_sam, load
from segzero_jax.config import Config, RewardConfig
from segzero_jax.data.pipeline import Source, open_split
from segzero_jax.evaluate.judging import Judge, OracleJudge, PolicyJudge
from segzero_jax.evaluate.respondent import Respondent
from segzero_jax.evaluate.results import result
from segzero_jax.evaluate.work import ORACLE, EvaluateError, Task, work
from segzero_jax.identity import fingerprint
from segzero_jax.intervals import with_interval
from segzero_jax.options import say
from segzero_jax.patience import Patience
from segzero_jax.pods import ALONE, WHATEVER_IT_TAKES_S, Pod
from segzero_jax.reward_channel import Access
from segzero_jax.reward_client import RewardClient
from segzero_jax.scoring import Scorer
from segzero_jax.segmenting import connected
from segzero_jax.types import Example, Frame

# SAM 2 may take minutes for a batch without a GPU; after this much silence, it will not come back.
_PATIENCE_S = 1800.0
_SHOWN_NUMBERS = (("giou", "gIoU"), ("ciou", "cIoU"), ("box_accuracy", "box accuracy"), ("n_acc", "N-acc."))


@dataclass(frozen=True)
class Questions(Sequence[Example]):
    """A split, or only the questions at ``places`` in it."""

    dataset: str
    split: str
    source: Source
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self.source[self.places[index]]


def open_questions(name: str, data_dir: str | Path, limit: int | None = None) -> Questions:
    """The questions of "NAME" or "NAME/SPLIT", by default split "val", limited to ``Source.first(limit)``.

    Raises:
      DataError: there is no such set or split.
      EvaluateError: it has no questions.
    """
    dataset, _, split = name.partition("/")
    source = open_split(dataset, split or "val", data_dir)
    if not len(source):
        raise EvaluateError(f"data set {name}: no questions in it")
    places = range(len(source)) if limit is None or limit >= len(source) else source.first(limit)
    return Questions(dataset, split or "val", source, places)


@dataclass(frozen=True)
class How:
    """How questions are asked.

    Attributes:
      batch: questions at once.
      samples: 0 for one greedy answer, else the number of drawn answers; ``seed`` is their random seed.
      mesh: as in training.
      server: "local", "none" or addresses; ``sam`` is what a local server loads, by default the run's own.
      image_size, prompt: override a run's own.
      repetition_penalty: see ``rollout.Sampling``.
    """

    batch: int = 32
    samples: int = 0
    seed: int = 0
    mesh: str = "1x1"
    server: str = "local"
    access: Access = field(default_factory=Access)
    sam: str | None = None
    image_size: int | None = None
    prompt: str | None = None
    repetition_penalty: float = 1.0


class Evaluator:
    """Evaluates policies one after another with one SAM 2, and keeps the results. Use it as a context manager.

    On several hosts all make the same calls and answer together; host 0 asks SAM 2, writes, and has the results.
    """

    def __init__(self, how: How, out: Path, pod: Pod = ALONE) -> None:
        """Loads and starts nothing yet; the ambient mesh is ``how.mesh``."""
        self._how, self._out, self._pod = how, out, pod
        self._stack = contextlib.ExitStack()
        self._sam: tuple[RewardClient, str] | None = None
        waits = RewardConfig(checkpoint_after_s=_PATIENCE_S, patience_s=_PATIENCE_S)
        self._patience = Patience(waits, say, lambda: False, advice="the same command goes on once it is back")
        self.results: list[dict[str, Any]] = []
        self.rows: list[list[dict[str, Any]]] = []

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def policy(self, checkpoint: str, sets: Sequence[Questions]) -> None:
        """Evaluates a checkpoint on these questions."""
        if not sets:
            return
        how = self._how
        if self._pod.first:
            say(f"policy: {checkpoint}")
        loaded = load(checkpoint, how.image_size, how.prompt, how.repetition_penalty)
        config = loaded.config
        if self._pod.first and config.reward.functions:
            say(f"reward: that of {config.reward.recipe} alone, without {', '.join(config.reward.functions)}")
        # Hosts that are ahead wait for a local server here rather than in a program.
        sam = self._pod.from_first("the reward service", lambda: self._segmenter(config)[1], WHATEVER_IT_TAKES_S)
        respondent = Respondent(loaded, how.batch, how.samples, how.seed, self._pod)
        asked_how = _asked_how(loaded, drawn=how.samples > 0)
        del loaded  # The respondent has its own copy of the weights, and device memory is for one.
        if not self._pod.first:
            for questions in sets:
                respondent.follow(questions)
            return
        frame = Frame(config.data.image_size, config.data.image_size)
        client, _ = self._segmenter(config)
        judge = PolicyJudge(
            respondent, Scorer(config.reward, frame, client), frame, config.reward.recipe, self._patience
        )
        options = self._options(sam) | asked_how | {"seed": how.seed if how.samples else 0}
        for questions in sets:
            self._one(questions, checkpoint, how.samples, options, judge)
            respondent.finished()

    def oracle(self, sets: Sequence[Questions]) -> None:
        """Evaluates the targets' own boxes and points, on host 0 only.

        Questions whose target is not a mask are left out: their target is SAM 2's own mask for box and points.
        """
        if not self._pod.first:
            return
        client, sam = self._segmenter(Config())
        assert client is not None, "checked with the options"
        for questions in sets:
            measured = _with_masks(questions)
            if left := len(questions) - len(measured):
                name = f"{questions.dataset}/{questions.split}"
                say(f"{name}: {left} of {len(questions)} questions have no target mask and are left out of the ceiling")
            if len(measured):
                self._one(measured, ORACLE, 0, self._options(sam), OracleJudge(client, self._patience))

    def _one(self, questions: Questions, checkpoint: str, samples: int, options: dict[str, Any], judge: Judge) -> None:
        dataset, split, count = questions.dataset, questions.split, len(questions)
        # Earlier versions took the first questions in order: if these are others, it is another evaluation.
        order = {} if list(questions.places) == list(range(count)) else {"order": "of every picture one"}
        task = Task(dataset, split, questions.source.checksum, count, checkpoint, samples, options | order)
        say(f"evaluating {task.name}")
        rows = work(task, self._out, questions, judge, say)
        self.rows.append(rows)
        self.results.append(result(task, rows))
        numbers = self.results[-1]["expression"]
        found = (f"{name} {with_interval(numbers, key)}" for key, name in _SHOWN_NUMBERS if numbers[key] is not None)
        failed = len(self.results[-1]["failed"])
        also = f"; {failed} answer{'s' if failed > 1 else ''} failed" if failed else ""
        say(f"{dataset}/{split}: {', '.join(found)}{also}")

    def _options(self, sam: str) -> dict[str, Any]:
        return {"batch": self._how.batch, "mesh": self._how.mesh, "sam": sam}

    def _segmenter(self, config: Config) -> tuple[RewardClient | None, str]:
        """The client (None without a server) and a description of the server's model: the same for all policies."""
        how = self._how
        if how.server == "none":
            return None, "none"
        if self._sam is None:
            advice = "run the same command again, perhaps with a smaller --sam: it goes on where it was"
            sam = how.sam or default_sam(config)
            client = self._stack.enter_context(connected(how.server, how.access, sam, say, advice))
            info = client.info(loaded=True)
            self._sam = client, f"{info.model} {info.checkpoint_sha256[:16]} {info.dtype}"
        return self._sam


def _with_masks(questions: Questions) -> Questions:
    """The questions whose target is a mask, and those without a target in the image."""
    examples = ((place, questions.source[place]) for place in questions.places)
    return replace(questions, places=[place for place, one in examples if one.mask is not None or not one.objects])


def _asked_how(loaded: Loaded, drawn: bool) -> dict[str, Any]:
    config = loaded.config
    sampling = {name: getattr(config.rollout, name) for name in ("temperature", "top_p", "top_k")} if drawn else {}
    if loaded.repetition_penalty != 1:
        sampling["repetition_penalty"] = loaded.repetition_penalty
    return {
        **sampling,
        "image_size": config.data.image_size,
        "resampling": config.data.resampling,
        "prompt": config.data.prompt,
        "max_response_tokens": config.rollout.max_response_tokens,
        "compute_dtype": config.model.compute_dtype,
        "recipe": config.reward.recipe,
        "mask_iou_weight": config.reward.mask_iou_weight,
        "mask_iou_mode": config.reward.mask_iou_mode,
        # A path does not identify a policy: a run may be trained again there, a directory exported again, a hub id
        # updated.
        "weights": fingerprint(loaded.policy, jnp.dtype(config.model.compute_dtype)),
    }
