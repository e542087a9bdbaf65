"""Sends answers, a policy's or the targets themselves (the oracle), to SAM 2 and turns its scores into numbers."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from segzero_jax.evaluate.respondent import Reply, Respondent
from segzero_jax.evaluation import Response, read_response, rewarded, sample_row
from segzero_jax.patience import Patience
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import ScoreRequest
from segzero_jax.scoring import Scorer, solution
from segzero_jax.types import Example, Frame

# Waits for SAM 2 and returns the rows of a batch, question by question and answer by answer.
Pending = Callable[[], list[dict[str, Any]]]


class Judge(Protocol):
    """Answers a batch of questions that starts at index ``start`` of its split, and sends the answers to be scored."""

    def __call__(self, examples: Sequence[Example], start: int) -> Pending: ...


class PolicyJudge:
    """Judges a policy's answers."""

    def __init__(self, respondent: Respondent, scorer: Scorer, frame: Frame, recipe: str, patience: Patience) -> None:
        """``frame`` is the frame of the policy's answers; ``recipe`` the rewards'; ``patience`` waits for SAM 2."""
        self._respondent, self._scorer, self._frame, self._recipe = respondent, scorer, frame, recipe
        self._patience = patience

    def __call__(self, examples: Sequence[Example], start: int) -> Pending:
        replies = self._respondent(examples, start)
        pending = self._scorer.send(examples, [reply.texts for reply in replies], masks=len(examples))

        def rows() -> list[dict[str, Any]]:
            scored = pending.result(self._patience)
            found = []
            for q, (example, reply) in enumerate(zip(examples, replies, strict=True)):
                target = solution(example, self._frame, self._recipe)
                for a, response in enumerate(self._read(example, reply)):
                    score = scored.masks[q][a] if scored.masks is not None else None
                    row = sample_row(example, response, score, target)
                    found.append({"index": start + q, "sample": a} | row | rewarded(scored, q, a))
            return found

        return rows

    def _read(self, example: Example, reply: Reply) -> list[Response]:
        return [
            read_response(text, example, self._frame, self._recipe, finished, reply.problem)
            for text, finished in zip(reply.texts, reply.finished, strict=True)
        ]


class OracleJudge:
    """Judges the target boxes and points instead of an answer: the result of the same SAM 2 for a perfect policy."""

    def __init__(self, client: RewardClient, patience: Patience) -> None:
        self._client, self._patience = client, patience

    def __call__(self, examples: Sequence[Example], start: int) -> Pending:
        requests = [
            ScoreRequest(
                id=example.id,
                image=example.image,
                frame=example.frame,
                target=example.mask if example.mask is not None else example.objects,
                candidates=(example.objects,),
                ignore=example.ignore,
            )
            for example in examples
        ]
        pending = self._client.score(requests, len(requests))

        def rows() -> list[dict[str, Any]]:
            groups = zip(examples, pending.result(self._patience), strict=True)
            return [
                {"index": start + q, "sample": 0} | sample_row(example, Response("", example.objects), score, "")
                for q, (example, (score,)) in enumerate(groups)
            ]

        return rows
