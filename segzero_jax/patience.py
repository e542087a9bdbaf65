"""What a run does while its reward service is away: says so, saves a checkpoint, and in the end gives up."""

import time
from collections.abc import Callable
from datetime import datetime
from types import TracebackType

from segzero_jax.config import RewardConfig
from segzero_jax.metrics import duration
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway

_FIRST_WORD_S = 15.0
_NEXT_WORD_S = 60.0


class Patience:
    """Goes with one wait for scores. Use it as a context manager: what ends the wait in failure saves a checkpoint too.

    Silence is the time since the wait began or the last answer came: a service that is merely slow is never given up.
    """

    def __init__(
        self,
        reward: RewardConfig,
        say: Callable[[str], None],
        save: Callable[[], bool],
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is waited for yet.

        Args:
          reward: ``checkpoint_after_s`` and ``patience_s`` count.
          say: says a line to whoever watches.
          save: writes what a resumed run needs to repeat this wait; returns whether it is on the disk.
          check: is called every second and raises to end the wait for another reason.
          clock: seconds.
        """
        self._reward = reward
        self._say = say
        self._save = save
        self._check = check
        self._clock = clock
        self._since: float | None = None
        self._spoke_s: float | None = None
        self._saved = False

    def __enter__(self) -> "Patience":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RewardServerError):
            self._keep()

    def heard(self) -> None:
        """An answer came."""
        self._check()
        if self._since is not None and self._spoke_s is not None:
            self._say(f"the reward service answers again, after {duration(self._clock() - self._since)}")
        self._since = self._spoke_s = None

    def silent(self, why: Callable[[], str]) -> None:
        """No answer; to be called every second or so.

        Args:
          why: finds out, which may take seconds, how the servers are.

        Raises:
          RewardServiceAway: it has been too long.
        """
        self._check()
        now = self._clock()
        self._since = now if self._since is None else self._since
        silent_s = now - self._since
        if silent_s >= self._reward.patience_s:
            self._keep()
            raise RewardServiceAway(
                f"no scores for {duration(silent_s)}: {why()}: gave up, --resume repeats this step once it is back"
            )
        if self._word_due(silent_s):
            began = datetime.fromtimestamp(time.time() - silent_s).strftime("%H:%M:%S")
            self._say(f"waiting for scores since {began}: {why()}")
            self._spoke_s = silent_s
        if silent_s >= self._reward.checkpoint_after_s:
            self._keep()

    def _word_due(self, silent_s: float) -> bool:
        if self._spoke_s is None:
            return silent_s >= min(_FIRST_WORD_S, self._reward.checkpoint_after_s, self._reward.patience_s / 2)
        return silent_s >= self._spoke_s + _NEXT_WORD_S

    def _keep(self) -> None:
        if not self._saved and self._save():
            self._saved = True
            self._say("the last finished step is saved: --resume goes on from it")
