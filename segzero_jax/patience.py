"""Waiting while the reward service is away: the run reports that, saves a checkpoint, and finally gives up.

Several hosts wait together. Each waits for its own scores, but every second or so they exchange their state: a
checkpoint is saved by all or none, and when one gives up all do.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType

from pydantic import TypeAdapter

from segzero_jax.config import RewardConfig
from segzero_jax.pods import ALONE, Pod
from segzero_jax.progress import duration
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway

_FIRST_WORD_S = 15.0
_NEXT_WORD_S = 60.0


@dataclass(frozen=True)
class _Word:
    """The state of one host's wait.

    Attributes:
      line: a line to print.
      save: whether it is time for a checkpoint.
      gave_up: why the wait failed; empty while it has not.
      away: whether it failed because the service was unreachable.
      found: what the host waited for; None while it waits.
    """

    line: str = ""
    save: bool = False
    gave_up: str = ""
    away: bool = True
    found: str | None = None


_WORD = TypeAdapter(_Word)


class Patience:
    """Supervises successive waits for scores. A context manager: a failure that ends a wait saves a checkpoint.

    Silence is the time since the wait began or the last answer came: a service that is merely slow is never given up.
    """

    def __init__(
        self,
        reward: RewardConfig,
        say: Callable[[str], None],
        save: Callable[[], bool],
        check: Callable[[], None] = lambda: None,
        pod: Pod = ALONE,
        clock: Callable[[], float] = time.monotonic,
        count: Callable[[float], None] = lambda seconds: None,
        advice: str = "--resume repeats this step once it is back",
    ) -> None:
        """Does not wait for anything yet.

        Args:
          reward: provides ``checkpoint_after_s`` and ``patience_s``.
          say: prints a line.
          save: writes what a resumed run needs to repeat this wait; returns whether it is on disk.
          check: called every second, by all of several hosts together; raises to end the wait for another reason.
          pod: the hosts that wait together.
          clock: returns seconds.
          count: is told of all seconds that pass in silence, here or on another host, as they pass.
          advice: what the user can do after the run has given up.
        """
        self._reward = reward
        self._say = say
        self._save = save
        self._check = check
        self._pod = pod
        self._clock = clock
        self._count = count
        self._advice = advice
        self._counted_s = 0.0
        self._since: float | None = None
        self._spoke_s: float | None = None
        self._saved = False
        self._save_from_s = 0.0
        self._all_know = False

    def __enter__(self) -> "Patience":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RewardServerError) and not self._all_know:
            with contextlib.suppress(RewardServerError):
                self._agree(_Word(save=True, gave_up=str(error), away=isinstance(error, RewardServiceAway)))

    def begin(self) -> None:
        """Begins another wait: the time before it does not count as silence."""
        self._since = self._spoke_s = None

    def heard(self) -> None:
        """Records that an answer came."""
        if self._pod.count == 1:
            self._check()
        if self._since is not None and self._spoke_s is not None:
            self._say(f"the reward service answers again, after {duration(self._clock() - self._since)}")
        self._since = self._spoke_s = None

    def silent(self, why: Callable[[], str]) -> None:
        """Records that no answer came; to be called every second or so.

        Args:
          why: returns the state of the servers, which may take seconds to find out.

        Raises:
          RewardServiceAway: the silence has lasted too long.
        """
        if self._pod.count == 1:
            self._check()
        now = self._clock()
        if self._since is None:
            self._since, self._counted_s, self._save_from_s = now, 0.0, 0.0
        silent_s = now - self._since
        self._count(silent_s - self._counted_s)
        self._counted_s = silent_s
        line, gave_up = "", ""
        if silent_s >= self._reward.patience_s:
            gave_up = f"no scores for {duration(silent_s)}: {why()}: gave up, {self._advice}"
        elif self._word_due(silent_s):
            began = datetime.fromtimestamp(time.time() - silent_s).strftime("%H:%M:%S")
            line = f"waiting for scores since {began}: {why()}"
            self._spoke_s = silent_s
        save = bool(gave_up) or silent_s >= max(self._reward.checkpoint_after_s, self._save_from_s)
        self._agree(_Word(line=line, save=save, gave_up=gave_up))

    def finish(self, found: str) -> list[str]:
        """Every host's result, once all have one; to be called by a host that has all its scores.

        Raises:
          RewardServerError: another host cannot get its scores.
          RewardServiceAway: another host has waited for too long.
        """
        while True:
            began = self._clock()
            words = self._agree(_Word(found=found))
            everything = [word.found for word in words if word.found is not None]
            if len(everything) == len(words):
                return everything
            self._count(self._clock() - began)

    def _agree(self, word: _Word) -> list[_Word]:
        """Tells the other hosts and does what any of them asks for. Raises the error of the first that gave up."""
        said = self._pod.exchange("scores", _WORD.dump_json(word).decode())
        words = [_WORD.validate_json(text) for text in said]
        if self._pod.count > 1:
            self._check()
        for host, other in enumerate(words):
            if other.line:
                self._say(self._told_by(host) + other.line)
        if any(other.save for other in words):
            self._keep()
        for host, other in enumerate(words):
            if other.gave_up:
                self._all_know = True
                failure = RewardServiceAway if other.away else RewardServerError
                raise failure(self._told_by(host) + other.gave_up)
        return words

    def _told_by(self, host: int) -> str:
        return f"{self._pod.host(host)}: " if self._pod.count > 1 else ""

    def _word_due(self, silent_s: float) -> bool:
        if self._spoke_s is None:
            return silent_s >= min(_FIRST_WORD_S, self._reward.checkpoint_after_s, self._reward.patience_s / 2)
        return silent_s >= self._spoke_s + _NEXT_WORD_S

    def _keep(self) -> None:
        if self._saved:
            return
        if self._save():
            self._saved = True
            self._say("the last finished step is saved: --resume continues from it")
        elif self._since is not None:
            self._save_from_s = self._clock() - self._since + _NEXT_WORD_S
