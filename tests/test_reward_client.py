"""The reward client against servers that are slow, gone, foreign or wrong: one clear line each, never a zero score."""

import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fake_reward_server import AREA, NOT_SERVING, SERVICE, SERVING, Fake, assert_take_turns, free_port, running, serving

from reward_server import reward_pb2
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import ScoreRequest
from segzero_jax.types import Frame, ObjectPrompt, RleMask

ITEM = ObjectPrompt((1.5, 2.0, 30.0, 40.25), ((10.0, 11.0),))


def counting() -> Fake:
    """Answers with the number of each candidate's objects as its intersection."""
    fake = Fake()
    fake.inside = lambda candidate: len(candidate.objects)
    return fake


def group(id: str, *counts: int, image: bytes = b"picture") -> ScoreRequest:
    """A group whose candidates have these numbers of objects."""
    return ScoreRequest(id, image, Frame(50, 60), RleMask(60, 50, "abc"), tuple((ITEM,) * n for n in counts))


class TestScore:
    def test_sends_everything_and_keeps_the_order(self) -> None:
        fake = counting()
        with serving(fake) as address, RewardClient(address, 10) as client:
            groups = [group(str(i), i % 3, 3, 0, image=bytes([i])) for i in range(16)]
            answers = client.score(groups).result()
        assert [[score.intersection for score in scores] for scores in answers] == [[i % 3, 3, 0] for i in range(16)]
        assert answers[1][1].iou == 3 / AREA
        assert answers[1][1].error == ""
        assert answers[1][1].mask is None
        request = next(request for request in fake.seen if request.request_id == "1")
        assert (request.frame.width, request.frame.height) == (50, 60)
        assert request.image.data == b"\x01"
        assert request.image.sha256 == hashlib.sha256(b"\x01").digest()
        assert (request.target.mask.height, request.target.mask.width, request.target.mask.counts) == (60, 50, "abc")
        item = request.candidates[0].objects[0]
        assert (item.box.x1, item.box.y1, item.box.x2, item.box.y2) == ITEM.box
        assert [(point.x, point.y) for point in item.points] == list(ITEM.points)
        assert not request.return_masks

    def test_sends_the_pixels_to_ignore(self) -> None:
        fake = Fake()
        with serving(fake) as address, RewardClient(address, 10) as client:
            client.score([group("a", 1), replace(group("b", 1), ignore=RleMask(60, 50, "def"))]).result()
        plain, ignoring = sorted(fake.seen, key=lambda request: request.request_id)
        assert not plain.HasField("ignore")
        assert (ignoring.ignore.height, ignoring.ignore.width, ignoring.ignore.counts) == (60, 50, "def")

    def test_sends_target_objects_and_brings_masks(self) -> None:
        fake = Fake()
        fake.change = lambda response: response.candidates[0].mask.MergeFrom(
            reward_pb2.Rle(height=1, width=2, counts="02")
        )
        with serving(fake) as address, RewardClient(address, 10) as client:
            asked = ScoreRequest("a", b"x", Frame(5, 6), (ITEM, ITEM), ((ITEM,),))
            scores = client.score([asked], masks=1).result()
            masks = client.segment(b"x", Frame(5, 6), [(ITEM,), ()], id="b")
        assert fake.seen[0].return_masks
        assert len(fake.seen[0].target.objects.objects) == 2
        assert scores[0][0].mask == RleMask(1, 2, "02")
        assert [(m.mask, m.model_score, m.error) for m in masks] == [(RleMask(2, 3, "06"), 0.5, "")] * 2

    def test_a_group_is_as_many_calls_as_its_masks_need(self) -> None:
        """A candidate without objects has a mask too, where masks are asked for."""
        fake = counting()
        with serving(fake) as address, RewardClient(address, 10) as client:
            client.servers = [replace(client.info(), max_mask_pixels=2 * 50 * 60)]
            groups = [group(id, 0, 0, 0, 0) for id in ("masked", "plain")]
            assert [len(scores) for scores in client.score(groups, masks=1).result()] == [4, 4]
        sizes = [(request.request_id, len(request.candidates)) for request in fake.seen]
        assert sorted(sizes) == [("masked", 2), ("masked", 2), ("plain", 4)]

    def test_leaves_at_once(self) -> None:
        fake, hold, arrived = counting(), threading.Event(), threading.Barrier(4)
        fake.before = lambda request, context: (arrived.wait(10), hold.wait(10))
        with serving(fake) as address, RewardClient(address, 30) as client:
            pending = client.score([group(name, 1) for name in "abc"])
            # All three are at the server together while nothing here waits for an answer.
            arrived.wait(10)
            assert not pending.done()
            hold.set()
            assert [scores[0].intersection for scores in pending.result()] == [1, 1, 1]
            assert pending.done()

    def test_a_refused_candidate_or_group_has_a_reason_and_no_score(self) -> None:
        fake = counting()

        def refuse(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
            if request.request_id == "bad":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "image: torn")

        fake.before = refuse
        fake.change = lambda response: response.candidates[0].CopyFrom(
            reward_pb2.CandidateScore(status=reward_pb2.Status(code=3, message="no box"))
        )
        with serving(fake) as address, RewardClient(address, 10) as client:
            good, bad = client.score([group("good", 1, 2), group("bad", 1, 2)]).result()
        assert [(score.iou, score.error) for score in good] == [(None, "no box"), (2 / AREA, "")]
        assert [(score.iou, score.error) for score in bad] == [(None, "image: torn")] * 2

    def test_a_picture_that_is_refused_gets_no_masks_and_is_not_asked_for_again(self) -> None:
        fake = Fake()
        fake.Segment = lambda request, context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "image: torn")
        refused = pytest.raises(RewardServerError, match="INVALID_ARGUMENT: image: torn")
        with serving(fake) as address, RewardClient(address, 10) as client, refused as error:
            client.segment(b"x", Frame(5, 6), [()])
        assert not isinstance(error.value, RewardServiceAway)

    @pytest.mark.parametrize(
        "change",
        [
            lambda response: response.candidates.pop(),
            lambda response: response.MergeFrom(type(response)(request_id="b")),
        ],
    )
    def test_notices_an_answer_to_something_else(self, change: Callable[[reward_pb2.ScoreResponse], None]) -> None:
        fake = Fake()
        fake.change = change
        with serving(fake) as address, RewardClient(address, 10) as client:
            pending = client.score([group("a", 1, 1)])
            with pytest.raises(RewardServerError, match=r"asked 2 candidates of 'a', it answered [12] of '[ab]'"):
                pending.result()

    def test_retries_a_call_larger_than_grpcs_own_buffer(self) -> None:
        fake = counting()

        def fail_once(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
            if len(fake.seen) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

        fake.before = fail_once
        with serving(fake) as address, RewardClient(address, 20) as client:
            scores = client.score([group("a", 2, image=bytes(31 * 2**20))]).result()
        assert len(fake.seen) == 2
        assert scores[0][0].iou == 2 / AREA

    def test_obeys_a_server_that_is_full_for_now(self) -> None:
        fake, calls = counting(), []

        def full_once(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
            calls.append(time.monotonic())
            if len(calls) == 1:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", "700"),))
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")

        fake.before = full_once
        with serving(fake) as address, RewardClient(address, 20) as client:
            assert client.score([group("a", 1)]).result()[0][0].intersection == 1
        assert len(calls) == 2
        assert calls[1] - calls[0] >= 0.65, "gRPC's own first pause is at most a quarter of a second"

    def test_that_a_device_has_no_memory_for_is_given_up_in_time(self) -> None:
        """Others were answered: it is this one that does not fit, and to wait for ever would end the run."""
        fake, asked = counting(), []

        def too_large(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
            if request.request_id == "large":
                asked.append(request)
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory on the device")

        fake.before = too_large
        patience = Waiter()
        patience.silent = lambda why: None  # type: ignore[method-assign]
        with serving(fake) as address, RewardClient(address, 5) as client:
            small, large = client.score([group("small", 1), group("large", 1)]).result(patience)
        assert small[0].iou == 1 / AREA
        assert (large[0].iou, large[0].error) == (None, large[0].error)
        assert "out of memory on the device" in large[0].error
        assert len(asked) > 5

    def test_does_not_send_what_is_too_large(self) -> None:
        fake = Fake()
        with serving(fake) as address, RewardClient(address, 10) as client:
            big, small = client.score([group("big", 1, 1, image=bytes(2**25)), group("small", 1)]).result()
            with pytest.raises(RewardServerError, match=r"^request 'a': 3\d+ bytes, expected at most 33554432"):
                client.segment(bytes(2**25), Frame(5, 6), [()], id="a")
        assert [request.request_id for request in fake.seen] == ["small"]
        assert [score.iou for score in big] == [None, None]
        assert big[0].error.endswith("expected at most 33554432: shrink its image")
        assert small[0].error == ""


class TestAServerThatIsNotThere:
    def test_is_named_soon_when_nobody_waits_for_it(self) -> None:
        address, start = f"127.0.0.1:{free_port()}", time.monotonic()
        with RewardClient(address, 60, wait_for_ready=False) as client:
            pending = client.score([group("a", 1)])
            with pytest.raises(RewardServerError) as error:
                pending.result()
        assert time.monotonic() - start < 30
        assert_one_line(error.value, f"reward server {address}: unreachable", "python -m reward_server")

    def test_is_waited_for_until_the_deadline(self) -> None:
        address, said = f"127.0.0.1:{free_port()}", []
        with RewardClient(address, 1) as client:
            with pytest.raises(RewardServiceAway) as error:
                client.score([group("a", 1)]).result()
            assert_one_line(error.value, f"reward server {address}: no answer within 1 s")
            for call in (client.info, lambda: client.wait_until_serving(0.5, said.append)):
                with pytest.raises(RewardServerError) as error:
                    call()
                assert_one_line(error.value, f"reward server {address}: unreachable", "Connection refused")
            assert "(waited 0.5 s)" in str(error.value)

    def test_is_found_when_it_comes_up(self) -> None:
        port = free_port()
        with RewardClient(f"127.0.0.1:{port}", 30) as client:
            pending = client.score([group("a", 1)])
            time.sleep(0.5)
            with serving(Fake(), port=port):
                assert pending.result()[0][0].error == ""

    def test_that_takes_too_long_is_given_up(self) -> None:
        fake, hold = Fake(), threading.Event()
        fake.before = lambda request, context: hold.wait(10)
        with serving(fake) as address, RewardClient(address, 0.5) as client:
            with pytest.raises(RewardServerError, match=r"no answer within 0\.5 s"):
                client.score([group("a", 1)]).result()
            hold.set()

    @pytest.mark.parametrize("targets", ["", "localhost", "localhost:", ":50051", "host:0", "a:1,", "a:1;b:2"])
    def test_needs_a_host_and_a_port(self, targets: str) -> None:
        with pytest.raises(RewardServerError, match="expected host:port"):
            RewardClient(targets, 1)


class TestVersion:
    def test_of_another_server_is_named_beside_ours(self) -> None:
        with serving(Fake(version=99)) as address, RewardClient(address, 10) as client:
            for call in (client.info, lambda: client.wait_until_serving(10)):
                with pytest.raises(RewardServerError) as error:
                    call()
                ours = f"this client speaks {reward_pb2.API_VERSION_CURRENT}"
                assert_one_line(error.value, address, "speaks API version 99", ours)

    def test_of_a_server_that_joins_later_must_be_ours_too(self) -> None:
        """The first version says none with an answer, and knows nothing of pixels to ignore."""
        late = Fake()
        late.change = lambda response: response.ClearField("api_version")
        with (
            serving(Fake()) as first,
            running(late, NOT_SERVING) as (second, _, health),
            RewardClient(f"{first},{second}", 10) as client,
        ):
            client.wait_until_serving(0.1)
            health.set(SERVICE, SERVING)
            with pytest.raises(RewardServerError) as error:
                wait_until(lambda: ask(client, 1) or len(late.seen) > 1)
        ours = f"this client speaks {reward_pb2.API_VERSION_CURRENT}"
        assert_one_line(error.value, f"{first},{second}", "speaks API version 1", ours)

    def test_of_another_package_is_named(self) -> None:
        server = grpc.server(ThreadPoolExecutor(2))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with RewardClient(f"127.0.0.1:{port}", 10) as client, pytest.raises(RewardServerError) as error:
                client.wait_until_serving(10)
            assert_one_line(error.value, f"127.0.0.1:{port}: does not speak segzero.reward.v1")
        finally:
            server.stop(None)

    def test_and_limits_are_told(self) -> None:
        with serving(Fake()) as address, RewardClient(address, 10) as client:
            (info,) = client.wait_until_serving(10)
            assert info == client.info()
        assert (info.address, info.model, info.max_image_bytes, info.max_candidates) == (address, "fake", 5, 7)

    def test_a_server_that_does_not_load_is_given_up(self) -> None:
        with serving(Fake(), NOT_SERVING) as address, RewardClient(address, 10) as client:
            with pytest.raises(RewardServerError) as error:
                client.wait_until_serving(0.5)
            assert_one_line(error.value, f"reward server {address}: not serving", "(waited 0.5 s)")


class TestSeveralServers:
    def test_take_turns(self) -> None:
        fakes = [Fake(), Fake()]
        with serving(fakes[0]) as first, serving(fakes[1]) as second, RewardClient(f"{first},{second}", 10) as client:
            assert [info.address for info in client.wait_until_serving(10)] == [first, second]
            assert client.state() == f"reward server {first}: serves; reward server {second}: serves"
            assert_take_turns(fakes, lambda: ask(client, 1))

    def test_a_name_stands_for_its_addresses(self) -> None:
        fakes = [Fake(), Fake()]
        with serving(fakes[0]) as first, serving(fakes[1]) as second:
            names = [address.replace("127.0.0.1", "localhost") for address in (first, second)]
            with RewardClient(",".join(names), 10) as client:
                assert_take_turns(fakes, lambda: ask(client, 1))
            with RewardClient(names[0], 10) as client:
                ask(client, 1)

    def test_one_whose_name_is_unknown_is_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As one that is not there, it is done without; and found, once its name stands for something."""
        look_up, known = socket.getaddrinfo, {"a.example": "127.0.0.1"}

        def names(host: str, *rest: Any) -> Any:
            if host.endswith(".example") and host not in known:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return look_up(known.get(host, host), *rest)

        monkeypatch.setattr(socket, "getaddrinfo", names)
        fakes, said = [Fake(), Fake()], []
        with serving(fakes[0]) as first, serving(fakes[1]) as second:
            targets = [f"{name}.example:{at.rpartition(':')[2]}" for name, at in (("a", first), ("b", second))]
            with RewardClient(",".join(targets), 10) as client:
                for _ in range(4):
                    ask(client, 1)
                assert [len(fake.seen) for fake in fakes] == [4, 0]
                known["b.example"] = "127.0.0.1"
                assert_take_turns(fakes, lambda: ask(client, 1))
                # What a name no longer stands for may be there all the same.
                known.clear()
                assert_take_turns(fakes, lambda: ask(client, 1))
            with RewardClient(",".join(targets), 1) as client:
                with pytest.raises(RewardServiceAway, match="unreachable"):
                    client.wait_until_serving(0.2, said.append)
                with pytest.raises(RewardServiceAway, match="no answer within 1 s"):
                    client.score([group("a", 1)]).result()
                known |= {"a.example": "127.0.0.1", "b.example": "127.0.0.1"}
                assert_take_turns(fakes, lambda: ask(client, 1))

    def test_have_a_family_of_addresses_in_common(self) -> None:
        with pytest.raises(RewardServerError) as error:
            RewardClient("127.0.0.1:1,[::1]:1", 10)
        assert_one_line(error.value, "127.0.0.1:1,[::1]:1: expected IPv4 or IPv6 throughout")

    def test_one_that_stops_serving_gets_no_call_and_one_that_starts_does(self) -> None:
        fakes = [Fake(), Fake()]
        with (
            running(fakes[0]) as (first, _, health),
            running(fakes[1], NOT_SERVING) as (second, _, other),
            RewardClient(f"{first},{second}", 10) as client,
        ):
            ask(client, 6)
            assert [len(fake.seen) for fake in fakes] == [6, 0]
            other.set(SERVICE, SERVING)
            wait_until(lambda: ask(client, 2) or len(fakes[1].seen) > 0)
            health.enter_graceful_shutdown()  # what a server does that drains

            def none_of_six_for_the_first() -> bool:
                before = len(fakes[0].seen)
                ask(client, 6)
                return len(fakes[0].seen) == before

            wait_until(none_of_six_for_the_first)

    def test_one_that_dies_is_left_out_until_it_is_back(self) -> None:
        fakes = [Fake(), Fake()]
        with serving(fakes[1]) as second:
            with running(fakes[0]) as (first, server, _):
                port = int(first.rpartition(":")[2])
                client = RewardClient(f"{first},{second}", 10)
                assert_take_turns(fakes, lambda: ask(client, 1))
                server.stop(None).wait()
                ask(client, 6)
            with client, serving(fakes[0], port=port):
                before = len(fakes[0].seen)
                wait_until(lambda: ask(client, 2) or len(fakes[0].seen) > before)

    def test_one_is_enough_to_start_with(self) -> None:
        away, said = f"127.0.0.1:{free_port()}", []
        with serving(Fake()) as here, RewardClient(f"{away},{here}", 10) as client:
            assert [info.address for info in client.wait_until_serving(1, said.append)] == [here]
        assert_one_line(said[-1], f"continuing without reward server {away}: unreachable")

    def test_all_are_waited_for_at_first(self) -> None:
        with (
            serving(Fake()) as first,
            running(Fake(), NOT_SERVING) as (second, _, health),
            RewardClient(f"{first},{second}", 10) as client,
        ):
            threading.Timer(0.1, health.set, (SERVICE, SERVING)).start()
            assert [info.address for info in client.wait_until_serving(10)] == [first, second]

    def test_must_have_one_model(self) -> None:
        with serving(Fake(checkpoint="aa")) as first, serving(Fake(checkpoint="bb")) as second:
            with RewardClient(f"{first},{second}", 10) as client, pytest.raises(RewardServerError) as error:
                client.wait_until_serving(10)
            assert_one_line(error.value, "reward servers differ", first, second, "expected one model")


class TestACheckpoint:
    def test_is_known_once_somebody_has_answered(self) -> None:
        with serving(Fake(checkpoint="aa")) as address:
            for first in (lambda client: client.wait_until_serving(10), lambda client: ask(client, 1)):
                with RewardClient(address, 10) as client:
                    assert client.checkpoint_sha256 == ""
                    first(client)
                    assert client.checkpoint_sha256 == "aa"

    def test_that_changes_ends_the_wait(self) -> None:
        fake, patience = Fake(checkpoint="a" * 64, dtype="float32"), Waiter()
        with serving(fake) as address, RewardClient(address, 10) as client:
            client.wait_until_serving(10)
            ask(client, 1)
            fake.checkpoint = "b" * 64  # the server was started again, with other weights
            for call in (
                lambda: client.score([group("a", 1)]).result(patience, drop=True),
                lambda: client.segment(b"x", Frame(5, 6), [()]),
                lambda: client.wait_until_serving(10),
            ):
                with pytest.raises(RewardServerError) as error:
                    call()
                assert not isinstance(error.value, RewardServiceAway), "no waiting mends it"
                assert_one_line(
                    error.value, address, "checkpoint bbbbbbbbbbbb in", "from aaaaaaaaaaaa in float32: serve that one"
                )
            assert client.checkpoint_sha256 == "a" * 64

    def test_computed_in_another_dtype_is_another(self) -> None:
        """As by a server that came back without its GPU."""
        fake = Fake(checkpoint="aa", dtype="bfloat16")
        with serving(fake) as address, RewardClient(address, 10) as client:
            client.wait_until_serving(10)
            ask(client, 1)
            fake.dtype = "float32"
            for call in (lambda: ask(client, 1), lambda: client.segment(b"x", Frame(5, 6), [()])):
                with pytest.raises(RewardServerError) as error:
                    call()
                assert_one_line(error.value, address, "aa in float32, the scores before", "aa in bfloat16")

    def test_of_a_server_that_joins_later_must_be_the_same(self) -> None:
        late = Fake(checkpoint="bb")
        with serving(Fake(checkpoint="aa")) as first, running(late, NOT_SERVING) as (second, _, health):
            with RewardClient(f"{first},{second}", 10) as client:
                client.wait_until_serving(0.1)
                health.set(SERVICE, SERVING)
                with pytest.raises(RewardServerError) as error:
                    wait_until(lambda: ask(client, 1) or len(late.seen) > 1)
            assert_one_line(error.value, f"{first},{second}", "checkpoint bb", "from aa")


class Waiter:
    """Patience that is never needed."""

    def begin(self) -> None:
        pass

    def heard(self) -> None:
        pass

    def silent(self, why: Callable[[], str]) -> None:
        raise AssertionError(why())


def test_no_proxy_is_asked_for_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is for what lies outside; the servers are neighbours."""
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with serving(Fake()) as first, serving(Fake()) as second:
        for targets in (first, first.replace("127.0.0.1", "localhost"), f"{first},{second}"):
            with RewardClient(targets, 10, wait_for_ready=False) as client:
                assert [info.model for info in client.wait_until_serving(10)] == ["fake"] * len(targets.split(","))
                ask(client, 1)


def test_trainer_side_imports_no_torch() -> None:
    check = (
        "import sys, segzero_jax.reward_client, segzero_jax.local_server; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'sam2', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def ask(client: RewardClient, times: int) -> None:
    for _ in range(times):
        assert client.score([group("a", 1)]).result()[0][0].error == ""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def assert_one_line(error: Exception | str, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)
