"""Scores that are on their way: calls that were sent, sent again where they failed, and collected in order."""

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import grpc

from segzero_jax.reward_channel import RewardServerError, RewardServiceAway
from segzero_jax.reward_connection import RewardConnection, too_large
from segzero_jax.reward_messages import CandidateScore, ScoreRequest, ServerInfo, refusal, score_request, split

# How often a wait without answers looks around, and the least pause before a call is sent again.
_TICK_S = 1.0
# A server that failed at one group so often, while the service answered others, will fail at it again.
_STRIKES = 5
# How a server says that a device has too little memory for a call.
_NO_MEMORY = "out of memory"


class Listener(Protocol):
    """Is told how a patient wait goes, see ``patience.Patience``."""

    def begin(self) -> None:
        """A wait begins."""

    def heard(self) -> None:
        """An answer came."""

    def silent(self, why: Callable[[], str]) -> None:
        """No answer came for another second; ``why`` asks the servers how they are. Raises to end the wait."""


class PendingScores:
    """Calls on their way. Dropping it does not cancel them; ``cancel`` does."""

    def __init__(
        self,
        connection: RewardConnection,
        servers: Sequence[ServerInfo],
        state: Callable[[Iterable[str]], str],
        groups: Sequence[ScoreRequest],
        masks: int,
    ) -> None:
        """Sends all groups; see ``RewardClient.score``.

        Args:
          servers: a group is split into as many calls as the least of them needs.
          state: says how the servers are, given how calls have failed.
        """
        self._connection, self._state = connection, state
        parts = [split(group, i < masks, servers) for i, group in enumerate(groups)]
        self._counts = [len(group) for group in parts]
        # From here on by number, one a request.
        self._requests = [score_request(part, i < masks) for i, group in enumerate(parts) for part in group]
        self._calls: dict[int, Any] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers: dict[int, list[CandidateScore]] = {}
        self._failed: set[int] = set()  # Sent again at the next tick.
        self._reasons: dict[int, str] = {}  # How the last call of each failed that has no answer yet.
        self._strikes: Counter[int] = Counter()
        self._heard = False  # Whether any answer has come: before that, the service is to blame, not a group.
        self._start = time.monotonic()
        for i, request in enumerate(self._requests):
            problem = too_large(request)
            if problem:
                self._answers[i] = refusal(request, problem)
            else:
                self._send(i)

    def done(self) -> bool:
        """Whether no call is on its way any more."""
        return all(call.done() for call in self._calls.values())

    def cancel(self) -> None:
        """Gives up what has not been answered."""
        for call in self._calls.values():
            call.cancel()

    def result(self, patience: Listener | None = None, drop: bool = False) -> list[list[CandidateScore]]:
        """Waits for all answers: per group, in order, one score per candidate.

        A group that the server refuses (a damaged image, a mask of another size) has its reason in every score; so has,
        with patience, one at which it fails time and again while it answers others, or for which its device still has
        too little memory after the client's timeout.

        Args:
          patience: what the service did not answer is asked again, for as long as this does not raise; without it a
            call that has failed is the end.
          drop: with patience, a group that is still not answered after the client's timeout is given up, with the
            reason in every score, provided that another group was answered: a service that is away is waited for.

        Raises:
          RewardServiceAway: the service went away or took too long.
          RewardServerError: it does not agree with this client: version, token, an answer to something else, or one
            by another SAM 2 checkpoint, or in another dtype, than before.
        """
        if patience is not None:
            patience.begin()
        try:
            while len(self._answers) < len(self._requests):
                try:
                    i = self._ended.get(timeout=_TICK_S)
                except queue.Empty:
                    if patience is not None:
                        patience.silent(lambda: self._state(self._reasons.values()))
                    self._send_again()
                else:
                    late = time.monotonic() - self._start >= self._connection.timeout_s
                    self._collect(i, late, patience)
                    if drop and late and self._heard and len(self._answers) + len(self._failed) == len(self._requests):
                        self._give_up(self._failed)
        except RewardServerError:
            self.cancel()
            raise
        answers = (self._answers[i] for i in range(len(self._requests)))
        return [[score for _ in range(count) for score in next(answers)] for count in self._counts]

    def _send(self, i: int) -> None:
        self._calls[i] = self._connection.start_score(self._requests[i])
        self._calls[i].add_done_callback(lambda _: self._ended.put(i))

    def _send_again(self) -> None:
        if self._failed and not self._heard:
            self._start = time.monotonic()  # The service was away: the time of each group begins anew.
            self._connection.look_up()
        for i in self._failed:
            self._send(i)
        self._failed.clear()

    def _collect(self, i: int, late: bool, patience: Listener | None) -> None:
        """Takes the answer of a call that has ended, or notes that it failed. Without patience a failure is raised."""
        call = self._calls[i]
        try:
            self._answers[i] = self._connection.scores(self._requests[i], call)
        except RewardServiceAway as error:
            if patience is None or self._connection.is_lost(call):
                raise
            self._reasons[i] = str(error)
            self._failed.add(i)
            self._strikes[i] += self._heard and call.code() == grpc.StatusCode.INTERNAL
            # Somebody else may hold the memory, but not for ever.
            no_memory = self._heard and late and _NO_MEMORY in (call.details() or "")
            if self._strikes[i] >= _STRIKES or no_memory:
                self._give_up([i])
        else:
            self._reasons.pop(i, None)
            self._heard = True
            if patience is not None:
                patience.heard()

    def _give_up(self, numbers: Iterable[int]) -> None:
        """What failed there is the answer."""
        for i in tuple(numbers):
            self._answers[i] = refusal(self._requests[i], self._reasons.pop(i))
            self._failed.discard(i)
