"""The saved state of a run: the state after the last finished step, saved when due and when the run must end.

A failed save (a full disk, an unreachable bucket) is reported and counted; training continues, and the next save
retries.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from segzero_jax.checkpoint import Checkpoints, SaveError
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.pods import ALONE, Pod


class Keeper:
    """Holds the last finished step, the only one that a run resumes from. All hosts of a run save together.

    Attributes:
      failed: number of failed saves since this run started.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: Config,
        identity: Identity,
        say: Callable[[str], None],
        pod: Pod = ALONE,
        lines: Callable[[Collection[int]], Mapping[str, Any]] = lambda kept: {},
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Starts without a finished step.

        Args:
          checkpoints: where saves go.
          config, identity: saved with every step.
          say: prints a line for the user.
          pod: the hosts that save together; each knows only why its own part was not written.
          lines: given the steps with checkpoints, returns the run's last lines and those of these steps; saved with
            every step.
          saved: called on host 0 with each step once its checkpoint is complete.
        """
        self.failed = 0
        self._checkpoints = checkpoints
        self._config = config
        self._identity = identity
        self._say = say
        self._pod = pod
        self._lines = lines
        self._saved = saved
        self._begun: int | None = None  # The step that is being saved.
        self._finished: tuple[int, TrainState, dict[str, Any]] | None = None
        self._problem = ""

    def finished(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Records the state for the next save.

        Args:
          step: number of finished steps.
          state: the state after them; may be donated once the next save has returned or the next step is in its update.
          data: position of the data iterator after this step's batch.
        """
        self._finished = step, state, data

    def save(self) -> bool:
        """Starts saving the last finished step; writing continues during training. A failure is reported, not raised.

        Returns:
          Whether all hosts have started.
        """
        assert self._finished is not None, "a step has to be finished first"
        self._wait()
        step, state, data = self._finished
        begun = self._attempt(
            lambda: self._checkpoints.save(
                step, state, data, self._config, self._identity, self._lines(self._checkpoints.steps)
            )
        )
        self._begun = step if begun else None
        return begun

    def keep(self) -> bool:
        """Saves the last finished step unless already saved, waits, and returns whether it is on disk."""
        begun = self.save()
        return self._wait() and begun

    def keep_or_fail(self) -> None:
        """Like ``keep``, for the end of a run. Raises SaveError: the last finished step is lost."""
        if not self.keep():
            newest = self._checkpoints.latest
            left = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
            raise SaveError(f"the last finished step is not saved: {self._problem}; {left}")

    def _wait(self) -> bool:
        """Whether the save that was begun is complete on all hosts, or none was begun."""
        done, step = self._attempt(self._checkpoints.wait), self._begun
        if done and step is not None and self._pod.first:
            self._saved(step)
        self._begun = None
        return done

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Whether ``act`` succeeded on all hosts; if it failed on one, all count and report the failure."""
        problem = ""
        try:
            act()
        except SaveError as error:
            problem = str(error)
        said = self._pod.exchange("a save", problem)
        # Most hosts only waited, and report the same reason.
        hosts = {said[host]: self._pod.host(host) for host in reversed(range(len(said))) if said[host]}
        if hosts:
            told = [text if len(said) == 1 else f"{host}: {text}" for text, host in hosts.items()]
            self.failed += 1
            self._problem = "; ".join(told)
            self._say(f"checkpoint not written: {self._problem}; training goes on, the next save tries again")
        return not hosts
