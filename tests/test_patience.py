"""What is said and saved while a service is silent, on a clock of the test's own."""

import re

import pytest

from segzero_jax.config import RewardConfig
from segzero_jax.patience import Patience
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway

REWARD = RewardConfig(checkpoint_after_s=100, patience_s=1000)


class Run:
    """A run that waits: its clock, what it said and when it saved."""

    def __init__(self, reward: RewardConfig = REWARD) -> None:
        self.now = 5.0
        self.said: list[tuple[float, str]] = []
        self.saves: list[float] = []
        self.patience = Patience(
            reward,
            lambda text: self.said.append((self.now - 5, text)),
            self.save,
            clock=lambda: self.now,
        )

    def save(self) -> bool:
        self.saves.append(self.now - 5)
        return True

    def silent_until(self, second: float) -> None:
        while self.now <= second + 5:
            self.patience.silent(lambda: "nobody home")
            self.now += 1


def test_says_saves_and_gives_up() -> None:
    run = Run()
    with pytest.raises(RewardServiceAway) as error, run.patience:
        run.silent_until(2000)
    assert str(error.value) == (
        "no scores for 16 min 40 s: nobody home: gave up, --resume repeats this step once it is back"
    )
    assert run.saves == [100]
    waiting = [when for when, text in run.said if text.startswith("waiting")]
    assert waiting == [15 + 60 * i for i in range(17)]
    assert re.fullmatch(r"waiting for scores since \d\d:\d\d:\d\d: nobody home", run.said[0][1])
    assert [when for when, text in run.said if "saved" in text] == [100]


def test_an_answer_begins_a_new_silence() -> None:
    run = Run()
    with run.patience:
        run.silent_until(90)
        run.patience.heard()
        assert run.said[-1] == (91, "the reward service answers again, after 1 min 31 s")
        before = len(run.said)
        run.silent_until(104)
        assert len(run.said) == before
        run.patience.heard()
        assert len(run.said) == before, "nothing was said of this silence, so nothing is of its end"
    assert run.saves == []


def test_a_short_patience_still_says_and_saves() -> None:
    run = Run(RewardConfig(checkpoint_after_s=300, patience_s=4))
    with pytest.raises(RewardServiceAway), run.patience:
        run.silent_until(10)
    assert run.saves == [4]
    assert run.said[0][0] == 2


def test_any_failure_of_the_service_saves_and_no_other_does() -> None:
    run = Run()
    with pytest.raises(RewardServerError, match="token"), run.patience:
        raise RewardServerError("token")
    assert len(run.saves) == 1
    run = Run()
    with pytest.raises(ZeroDivisionError), run.patience:
        raise ZeroDivisionError
    assert run.saves == []
