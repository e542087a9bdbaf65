"""What is said and saved while a service is silent, on a clock of the test's own."""

from collections.abc import Callable
from datetime import datetime

import pytest
from thread_pod import on_hosts

from segzero_jax.config import RewardConfig
from segzero_jax.patience import Patience
from segzero_jax.pods import ALONE, Pod
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway
from segzero_jax.time_account import PhaseTimer

REWARD = RewardConfig(checkpoint_after_s=100, patience_s=1000)


class Run:
    """A run that waits: its clock, what it said and when it saved."""

    def __init__(
        self, reward: RewardConfig = REWARD, pod: Pod = ALONE, check: Callable[[], None] = lambda: None
    ) -> None:
        self.now = 5.0
        self.timer = PhaseTimer(clock=lambda: self.now)
        self.said: list[tuple[float, str]] = []
        self.saves: list[float] = []
        self.patience = Patience(
            reward,
            lambda text: self.said.append((self.now - 5, text)),
            self.save,
            check,
            pod=pod,
            clock=lambda: self.now,
            count=lambda seconds: self.timer.move(seconds, "evaluation"),
        )

    def save(self) -> bool:
        self.saves.append(self.now - 5)
        return True

    def silent_until(self, second: float) -> None:
        while self.now <= second + 5:
            self.patience.silent(lambda: "nobody home")
            self.now += 1


def test_says_saves_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it has been silent is said as the time of day when that began."""
    run = Run()
    monkeypatch.setattr("segzero_jax.patience.time.time", lambda: 1.8e9 + run.now - 5)
    with pytest.raises(RewardServiceAway) as error, run.patience:
        run.silent_until(2000)
    assert str(error.value) == (
        "no scores for 16 min 40 s: nobody home: gave up, --resume repeats this step once it is back"
    )
    assert run.saves == [100]
    waiting = [when for when, text in run.said if text.startswith("waiting")]
    assert waiting == [15 + 60 * i for i in range(17)]
    began = datetime.fromtimestamp(1.8e9).strftime("%H:%M:%S")
    assert {text for _, text in run.said if "saved" not in text} == {f"waiting for scores since {began}: nobody home"}
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


def test_an_evaluation_that_waits_does_not_hang() -> None:
    """Whoever ends phases that take too long looks at the timer, and must leave this one to patience."""
    run = Run()
    with run.timer.phase("evaluation"), run.patience:
        run.now += 7  # Sampling.
        run.silent_until(70)
        phase, seconds = run.timer.running()
        assert (phase, seconds) == ("evaluation", 8), "its own time, and the last second, which nobody has asked about"
        run.patience.heard()
        run.now += 3
        run.silent_until(100)
        assert run.timer.running() == ("evaluation", 8 + 3 + 1), "as much again of the second silence"
    assert run.timer.take() == {"evaluation": pytest.approx(101), "other": 0}, "none of it is a step's"


def test_a_save_that_fails_is_tried_once_a_minute() -> None:
    """The network that keeps scores away may keep checkpoints away."""
    run = Run()
    run.patience._save = lambda: run.save() and len(run.saves) > 3
    with run.patience:
        run.silent_until(400)
    assert run.saves == [100, 160, 220, 280]


def test_what_passes_between_two_waits_is_no_silence() -> None:
    """A wait may end with a refusal, after which nobody was heard."""
    run = Run()
    with run.patience:
        run.silent_until(90)
        run.now += 1500  # The policy answers the next questions.
        run.patience.begin()
        run.silent_until(run.now - 5 + 401)
    assert run.saves == [90 + 1 + 1500 + 100]


def test_a_short_patience_still_says_and_saves() -> None:
    run = Run(RewardConfig(checkpoint_after_s=300, patience_s=4))
    with pytest.raises(RewardServiceAway), run.patience:
        run.silent_until(10)
    assert run.saves == [4]
    assert run.said[0][0] == 2
    run = Run(RewardConfig(checkpoint_after_s=5, patience_s=1000))
    run.silent_until(6)
    assert [when for when, text in run.said if text.startswith("waiting")] == run.saves == [5], "no save unexplained"


class Preempted(Exception):
    """What a check raises."""


def test_another_reason_ends_a_wait_at_once() -> None:
    """Silent or not, alone or with others, who all come to it in the same round; nothing is saved for the service."""

    def wait(pod: Pod, speak: bool) -> Run:
        looked: list[None] = []

        def check() -> None:
            looked.append(None)
            if len(looked) == 3:
                raise Preempted

        run = Run(pod=pod, check=check)
        step = run.patience.heard if speak else lambda: run.patience.silent(lambda: "nobody home")

        def wait_on() -> None:
            while run.now < 50:
                run.now += 1
                step()

        with pytest.raises(Preempted), run.patience:
            wait_on()
        return run

    runs = [wait(ALONE, speak=True), wait(ALONE, speak=False)]
    runs += [end.result() for end in on_hosts(2, lambda pod: wait(pod, speak=False))]
    assert [(run.now, run.saves) for run in runs] == [(8.0, [])] * 4


def test_any_failure_of_the_service_saves_and_no_other_does() -> None:
    run = Run()
    with pytest.raises(RewardServerError, match="token"), run.patience:
        raise RewardServerError("token")
    assert len(run.saves) == 1
    run = Run()
    run.patience._save = lambda: False  # As where there is nothing to save, in an evaluation by itself.
    with pytest.raises(RewardServerError, match="token"), run.patience:
        raise RewardServerError("token")
    run = Run()
    with pytest.raises(ZeroDivisionError), run.patience:
        raise ZeroDivisionError
    assert run.saves == []


def test_a_host_that_has_an_answer_looks_with_the_others_alone() -> None:
    """They end in the round that is everyone's: a host that looks more often than the others would end in another."""

    def wait(pod: Pod) -> int:
        looked: list[None] = []
        run = Run(pod=pod, check=lambda: looked.append(None))
        with run.patience as patience:
            for _ in range(0 if pod.index else 3):
                patience.heard()
            patience.silent(lambda: "nobody home")
            patience.finish("scores")
        return len(looked)

    assert [end.result() for end in on_hosts(2, wait)] == [2, 2]


class Host:
    """One host of three: the last waits in silence, the others have found what they want."""

    def __init__(self, pod: Pod, seconds: int, outcome: Callable[[Patience], list[str]] | None = None) -> None:
        self.pod, self.seconds, self.outcome = pod, seconds, outcome
        self.run = Run(RewardConfig(checkpoint_after_s=3, patience_s=6), pod)

    def wait(self) -> list[str]:
        with self.run.patience as patience:
            if self.outcome is not None:
                return self.outcome(patience)
            if self.pod.index == 2:
                self.run.silent_until(self.seconds)
            return patience.finish(f"scores of {self.pod.index}")


def hosts(seconds: int, outcome: Callable[[Patience], list[str]] | None = None) -> tuple[list[Host], list]:
    met: list[Host] = []

    def act(pod: Pod) -> list[str]:
        host = Host(pod, seconds, outcome if pod.index == 2 else None)
        met.append(host)
        return host.wait()

    ended = on_hosts(3, act)
    return sorted(met, key=lambda host: host.pod.index), ended


def test_hosts_that_are_done_wait_for_the_last() -> None:
    met, ended = hosts(seconds=1)
    assert [end.result() for end in ended] == [["scores of 0", "scores of 1", "scores of 2"]] * 3
    assert [host.run.saves for host in met] == [[]] * 3


def test_hosts_that_wait_for_another_do_not_hang() -> None:
    """Nor are they ended: what they wait for is the reward service."""

    def act(pod: Pod) -> float:
        run = Run(pod=pod)
        with run.timer.phase("evaluation"), run.patience as patience:
            for _ in range(0 if pod.index else 5):
                patience.silent(lambda: "nobody home")
                run.now += 1
            exchange = pod.exchange

            def late(what: str, text: str) -> list[str]:
                run.now += 1
                return exchange(what, text)

            pod.exchange = late  # type: ignore[method-assign]
            patience.finish("scores")
            return run.timer.running()[1]

    assert [end.result() for end in on_hosts(2, act)] == [2, 1], "the last second or two, as yet uncounted"


def test_what_one_host_asks_for_all_save() -> None:
    met, ended = hosts(seconds=4)
    assert [end.result() for end in ended] == [["scores of 0", "scores of 1", "scores of 2"]] * 3
    assert [len(host.run.saves) for host in met] == [1, 1, 1]
    assert all("host 2 (w-2): waiting for scores since" in host.run.said[0][1] for host in met)


def test_when_one_gives_up_all_do() -> None:
    met, ended = hosts(seconds=10)
    for end in ended:
        with pytest.raises(
            RewardServiceAway, match=r"^host 2 \(w-2\): no scores for 6 s: nobody home: gave up, --resume repeats"
        ):
            end.result()
    assert [len(host.run.saves) for host in met] == [1, 1, 1]


def test_what_one_host_stumbles_over_stops_all() -> None:
    def stumble(_: Patience) -> list[str]:
        raise RewardServerError("the token is wrong")

    met, ended = hosts(seconds=0, outcome=stumble)
    for index, end in enumerate(ended):
        error = end.exception()
        assert type(error) is RewardServerError
        assert str(error) == ("" if index == 2 else "host 2 (w-2): ") + "the token is wrong"
    assert [len(host.run.saves) for host in met] == [1, 1, 1]
