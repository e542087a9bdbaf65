"""Servers that die, hang or stay away in the middle of calls: the client asks again, and the scores are the same."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from fake_reward_server import Fake, free_port, serving

from reward_server import reward_pb2
from segzero_jax import config as configs
from segzero_jax import pending_scores
from segzero_jax.config import Config
from segzero_jax.pending_scores import PendingScores
from segzero_jax.pods import ALONE
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import CandidateScore, ScoreRequest
from segzero_jax.reward_service import reward_service
from segzero_jax.types import Frame, ObjectPrompt

SERVER = Path(__file__).parents[1] / "fake_reward_server.py"


def groups(count: int, candidates: int = 3) -> list[ScoreRequest]:
    """Groups that all have other scores."""
    rows = []
    for i in range(count):
        objects = [(ObjectPrompt((i, g, i + 5.0, g + 5.0), ((i + 1.0, g + 1.0),)),) for g in range(candidates)]
        rows.append(ScoreRequest(f"group-{i}", bytes([i]) * 1000, Frame(50, 50), objects[0], tuple(objects)))
    return rows


def healthy_scores(asked: list[ScoreRequest]) -> list[list[CandidateScore]]:
    with serving(Fake()) as address, RewardClient(address, 10) as client:
        return client.score(asked).result()


class Waiter:
    """Waits for so many seconds of silence at most; acts at the first of them."""

    def __init__(self, limit_s: float = 30, at_first: Callable[[], None] = lambda: None) -> None:
        self._end = time.monotonic() + limit_s
        self._at_first = at_first
        self.heard_count = self.silent_count = 0
        self.answered = threading.Event()

    def begin(self) -> None:
        pass

    def heard(self) -> None:
        self.heard_count += 1
        self.answered.set()

    def silent(self, why: Callable[[], str]) -> None:
        self.silent_count += 1
        if self.silent_count == 1:
            self._at_first()
        if time.monotonic() > self._end:
            raise RewardServiceAway(f"gave up: {why()}")


@contextmanager
def process(port: int, delay_s: float) -> Iterator[subprocess.Popen[str]]:
    """The fake server as a process of its own; its first line of output has been read."""
    command = [sys.executable, str(SERVER), str(port), str(delay_s)]
    path = os.pathsep.join([str(SERVER.parents[1]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    try:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("127.0.0.1:")
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def score_until_called(
    client: RewardClient, asked: list[ScoreRequest], child: subprocess.Popen[str]
) -> list[PendingScores]:
    """Sends the groups again and again, until one of the calls has come to the process."""
    sent = [client.score(asked)]
    assert child.stdout is not None
    # At first all may go to the server whose connection stands first.
    while not select.select([child.stdout], [], [], 0.2)[0]:
        sent.append(client.score(asked))
    return sent


@pytest.mark.parametrize("patient", [False, True])
def test_killed_in_the_middle_of_calls_and_restarted_on_the_same_port(patient: bool) -> None:
    asked, port = groups(6), free_port()
    with RewardClient(f"127.0.0.1:{port}", 30) as client:
        with process(port, delay_s=60) as child:
            pending = client.score(asked)
            assert child.stdout is not None
            assert [child.stdout.readline() for _ in asked] == ["call\n"] * 6
            os.kill(child.pid, signal.SIGKILL)
        assert not pending.done()
        with process(port, delay_s=0):
            scores = pending.result(Waiter() if patient else None)
    assert scores == healthy_scores(asked)
    assert len({score.intersection for group in scores for score in group}) > 6


def test_a_start_that_goes_on_does_not_wait_for_servers_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patience is for a service of which nobody serves."""
    with serving(Fake()) as here:
        gone = f"127.0.0.1:{free_port()}"
        config = configs.replace(Config(), **{"reward.server": f"{here},{gone}", "reward.timeout_s": 1.0})
        began = time.monotonic()
        with reward_service(config, Access(), tmp_path, ALONE, patience_s=600) as client:
            assert client is not None
            assert [one.address for one in client.servers] == [here]
        assert time.monotonic() - began < 60
    assert f"continuing without reward server {gone}: " in capsys.readouterr().err


def test_one_of_two_killed_in_the_middle_of_calls() -> None:
    asked, fake = groups(8), Fake()
    port = free_port()
    with (
        serving(fake) as here,
        process(port, delay_s=60) as child,
        RewardClient(f"{here},127.0.0.1:{port}", 30) as client,
    ):
        assert len(client.wait_until_serving(10)) == 2
        sent = score_until_called(client, asked, child)
        os.kill(child.pid, signal.SIGKILL)
        expected = healthy_scores(asked)
        assert all(pending.result() == expected for pending in sent)
    assert len(fake.seen) == len(sent) * len(asked)


def test_a_deadline_that_passed_is_not_the_end() -> None:
    """Neither when all are waited for, nor when the others were answered."""
    for hung in (["group-0", "group-1", "group-2"], ["group-1"]):
        fake, hold = Fake(), threading.Event()
        fake.before = lambda request, _, hung=hung, hold=hold: request.request_id not in hung or hold.wait(30)
        asked, waiter = groups(3), Waiter(at_first=hold.set)
        with serving(fake) as address, RewardClient(address, 0.5) as client:
            assert client.score(asked).result(waiter) == healthy_scores(asked)
        assert waiter.heard_count == 3
        assert len(fake.seen) == 3 + len(hung), "each that hung was asked a second time"


def test_without_end_the_wait_ends_when_patience_does() -> None:
    address = f"127.0.0.1:{free_port()}"
    with RewardClient(address, 60) as client:
        pending = client.score(groups(2))
        with pytest.raises(RewardServiceAway) as error:
            pending.result(Waiter(limit_s=1))
        assert str(error.value).startswith(f"gave up: reward server {address}: unreachable")
        assert pending.done(), "nothing is left on its way"


def test_a_group_that_the_server_fails_at_time_and_again_has_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another is answered meanwhile; one that it fails at now and then is asked again."""
    monkeypatch.setattr(pending_scores, "_TICK_S", 0.05)
    fake, failures, waiter = Fake(), {"group-1": 100, "group-2": 3}, Waiter()

    def fail(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        if failures.get(request.request_id, 0) > 0:
            waiter.answered.wait(30)  # What fails before any answer counts against no group.
            failures[request.request_id] -= 1
            context.abort(grpc.StatusCode.INTERNAL, "the server failed: its log says how")

    fake.before = fail
    asked = groups(3)
    with serving(fake) as address, RewardClient(address, 10) as client:
        scores = client.score(asked).result(waiter)
    expected = healthy_scores(asked)
    assert (scores[0], scores[2]) == (expected[0], expected[2])
    for score in scores[1]:
        assert score.iou is None
        assert "INTERNAL: the server failed" in score.error
    assert failures == {"group-1": 95, "group-2": 0}


def test_a_group_that_is_late_however_often_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another is answered meanwhile; only what the server itself fails at is given up."""
    monkeypatch.setattr(pending_scores, "_TICK_S", 0.05)
    fake, failures, waiter = Fake(), 2 * pending_scores._STRIKES, Waiter()

    def fail(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        nonlocal failures
        if request.request_id == "group-1" and failures > 0:
            waiter.answered.wait(30)
            failures -= 1
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "late")

    fake.before = fail
    asked = groups(2)
    with serving(fake) as address, RewardClient(address, 10) as client:
        assert client.score(asked).result(waiter) == healthy_scores(asked)
    assert failures == 0


def test_failures_while_nothing_was_answered_count_against_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service was out of order for a while; one group it fails at some times more."""
    monkeypatch.setattr(pending_scores, "_TICK_S", 0.05)
    fake, failures = Fake(), 9

    def fail(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        nonlocal failures
        failures -= request.request_id == "group-1"
        # The other is answered once this one has failed six times.
        if failures >= (0 if request.request_id == "group-1" else 3):
            context.abort(grpc.StatusCode.INTERNAL, "out of order")

    fake.before = fail
    asked = groups(2)
    with serving(fake) as address, RewardClient(address, 10) as client:
        assert client.score(asked).result(Waiter()) == healthy_scores(asked)


def test_a_server_that_fails_at_all_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_scores, "_TICK_S", 0.05)
    fake = Fake()
    fake.before = lambda request, context: context.abort(grpc.StatusCode.INTERNAL, "out of order")
    with serving(fake) as address, RewardClient(address, 10) as client, pytest.raises(RewardServiceAway) as error:
        client.score(groups(2)).result(Waiter(limit_s=1))
    assert "INTERNAL: out of order" in str(error.value)
    assert len(fake.seen) > 10


def test_drop_leaves_out_what_was_not_answered_in_time() -> None:
    fake, hold = Fake(), threading.Event()
    fake.before = lambda request, context: request.request_id != "group-1" or hold.wait(30)
    asked = groups(3)
    with serving(fake) as address, RewardClient(address, 0.7) as client:
        scores = client.score(asked).result(Waiter(), drop=True)
        hold.set()
    expected = healthy_scores(asked)
    assert [scores[0], scores[2]] == [expected[0], expected[2]]
    assert [score.iou for score in scores[1]] == [None] * 3
    assert "no answer within 0.7 s" in scores[1][0].error


def test_drop_leaves_out_what_the_server_cannot_do() -> None:
    fake = Fake()

    def stumble(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        if request.request_id == "group-1":
            context.abort(grpc.StatusCode.INTERNAL, "stumbled")

    fake.before = stumble
    with serving(fake) as address, RewardClient(address, 2) as client:
        scores = client.score(groups(3)).result(Waiter(), drop=True)
    assert [score.error for score in scores[1]] == [f"reward server {address}: INTERNAL: stumbled: look at its log"] * 3
    assert [scores[i][0].error for i in (0, 2)] == ["", ""]
    assert len(fake.seen) > 4, "it was asked again before it was given up"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.INTERNAL, "INTERNAL: stumbled: look at its log"),
        (None, "no answer within 0.6 s"),
    ],
)
def test_why_calls_fail_is_told_where_the_server_says_that_it_serves(code: grpc.StatusCode | None, reason: str) -> None:
    """While the other group is answered, whose answer says nothing of the one that fails."""
    fake, told, hold = Fake(), [], threading.Event()

    def stumble(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        if request.request_id == "group-1":
            hold.wait(30) if code is None else context.abort(code, "stumbled")

    fake.before = stumble

    class Listener(Waiter):
        def silent(self, why: Callable[[], str]) -> None:
            told.append(why())
            super().silent(why)

    with serving(fake) as address, RewardClient(address, 0.6) as client:
        with pytest.raises(RewardServiceAway):
            client.score(groups(2)).result(Listener(limit_s=2))
        hold.set()
        assert told[-1].startswith(f"reward server {address}: serves; calls end with: {reason}")
        assert told[-1].count(address) == 1


def test_drop_waits_for_a_service_that_is_away_altogether() -> None:
    asked, port = groups(2), free_port()
    with RewardClient(f"127.0.0.1:{port}", 0.5) as client:
        pending, waiter = client.score(asked), Waiter()
        back = threading.Event()

        def serve() -> None:
            time.sleep(2)
            with serving(Fake(), port=port):
                back.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert pending.result(waiter, drop=True) == healthy_scores(asked)
        finally:
            back.set()
            thread.join()
    assert waiter.silent_count > 0


def test_a_child_process_that_is_gone_is_not_waited_for() -> None:
    waiter = Waiter()
    gone = RewardClient(f"127.0.0.1:{free_port()}", 60, wait_for_ready=False)
    with gone as client, pytest.raises(RewardServiceAway, match="unreachable"):
        client.score(groups(1)).result(waiter)
    assert waiter.silent_count < 15


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.OUT_OF_RANGE, "OUT_OF_RANGE: who are you: look at its log"),
        (grpc.StatusCode.FAILED_PRECONDITION, "FAILED_PRECONDITION: who are you: look at its log"),
        (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED: who are you: look at its log"),
        (grpc.StatusCode.UNAUTHENTICATED, "asks for a token (who are you): set reward.token_file"),
        (grpc.StatusCode.UNIMPLEMENTED, "does not speak segzero.reward.v1"),
    ],
)
def test_what_cannot_pass_is_not_waited_for(code: grpc.StatusCode, reason: str) -> None:
    fake, waiter = Fake(), Waiter()
    fake.before = lambda request, context: context.abort(code, "who are you")
    with serving(fake) as address, RewardClient(address, 10) as client, pytest.raises(RewardServerError) as error:
        client.score(groups(1)).result(waiter)
    assert reason in str(error.value)
    assert not isinstance(error.value, RewardServiceAway)
    assert waiter.silent_count == 0
