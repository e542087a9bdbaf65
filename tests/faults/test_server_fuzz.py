"""Ten thousand requests that no client would send: each is answered with a proper status, and nothing else breaks."""

import dataclasses
import functools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator

import grpc
from sam_calls import candidate, encoded, group_request, image_message, request_for, scene, serving

from reward_server import reward_pb2
from reward_server.segmenter import Prompt
from reward_server.server import SERVICE_NAME

REQUESTS = 10_000
# None of them waits for a minute unless the server hangs.
HANGS_AFTER_S = 60
NUMBERS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e-30, 840.0, 1e6, 1e7, -1e300, 1.8e308, math.inf, -math.inf, math.nan)
SIZES = (-(2**31), -1, 0, 1, 2, 223, 224, 65_536, 2**31 - 1)
TEXTS = ("", "0", "~", "PPYo1", "\x00", "\n", "é" * 9, "x" * 300, "0" * 4000)


@functools.cache
def good_request(index: int) -> reward_pb2.ScoreRequest:
    """One candidate on a corner of a scene."""
    whole = scene(index)
    item = dataclasses.replace(whole.objects[0], mask=whole.objects[0].mask[:64, :48])
    corner = dataclasses.replace(whole, image=whole.image[:64, :48], objects=(item,))
    return request_for(corner, candidate(Prompt((4, 5, 30, 40), ((12, 20),) * index)))


def small_request(draws: random.Random) -> reward_pb2.ScoreRequest:
    """A good request: up to two candidates on one of three pictures."""
    request = reward_pb2.ScoreRequest()
    request.CopyFrom(good_request(draws.randrange(3)))
    request.request_id = str(draws.randrange(1000))
    del request.candidates[:]
    request.candidates.extend(good_request(0).candidates[:1] * draws.randrange(3))
    return request


@functools.cache
def whole_picture(kind: str) -> bytes:
    return encoded(scene(0).image[:32, :48], kind)


def damaged_picture(draws: random.Random) -> bytes:
    data = bytearray(whole_picture(draws.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"])))
    for _ in range(draws.randrange(6)):
        data[draws.randrange(len(data))] = draws.randrange(256)
    return bytes(data[: draws.randrange(len(data) + 1)])


@functools.cache
def crowd(objects: int, points: int) -> reward_pb2.Candidate:
    """A candidate of so many objects, of so many points each."""
    return candidate(*[Prompt((1, 1, 9, 9), ((5, 5),) * points)] * objects)


def picture(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    request.image.CopyFrom(image_message(damaged_picture(draws)))


def hash_(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    request.image.sha256 = draws.randbytes(draws.choice([0, 1, 31, 32, 33, 64]))
    if draws.random() < 0.5:
        request.image.ClearField("data")


def frame(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    request.frame.width, request.frame.height = draws.choices(SIZES, k=2)


def target(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    match draws.randrange(4):
        case 0:
            request.ClearField("target")
        case 1:
            request.target.mask.height, request.target.mask.width = draws.choices(SIZES, k=2)
        case 2:
            request.target.mask.counts = draws.choice(TEXTS)
        case 3:
            request.target.objects.CopyFrom(odd_candidate(draws))


def ignore(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    request.ignore.CopyFrom(request.target.mask)
    match draws.randrange(3):
        case 0:
            request.ignore.height, request.ignore.width = draws.choices(SIZES, k=2)
        case 1:
            request.ignore.counts = draws.choice(TEXTS)


def candidates(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    request.candidates.extend(odd_candidate(draws) for _ in range(draws.randrange(1, 4)))


def many(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    match draws.randrange(3):
        case 0:
            request.candidates.extend([candidate()] * draws.choice([255, 256, 300]))
        case 1:
            request.candidates.append(crowd(draws.choice([257, 2049]), 0))
        case 2:
            request.candidates.append(crowd(1, draws.choice([17, 99])))


def name(request: reward_pb2.ScoreRequest, draws: random.Random) -> None:
    request.request_id = draws.choice(TEXTS)


def odd_candidate(draws: random.Random) -> reward_pb2.Candidate:
    made = reward_pb2.Candidate()
    for _ in range(draws.randrange(1, 3)):
        item = made.objects.add()
        if draws.random() < 0.9:
            item.box.x1, item.box.y1, item.box.x2, item.box.y2 = draws.choices(NUMBERS, k=4)
        for _ in range(draws.randrange(3)):
            item.points.add(x=draws.choice(NUMBERS), y=draws.choice(NUMBERS))
    return made


CHANGES = (picture, hash_, frame, target, ignore, candidates, many, name)


def fuzzed(seed: int) -> Iterator[tuple[str, bytes, reward_pb2.ScoreRequest | None]]:
    """Method, message, and what the message says where it is one."""
    draws = random.Random(seed)
    for _ in range(REQUESTS):
        request = small_request(draws)
        for change in draws.sample(CHANGES, draws.randrange(1, 3)):
            change(request, draws)
        request.return_masks = draws.random() < 0.2
        message = request.SerializeToString()
        method = draws.choice(["Score", "Score", "Score", "Segment", "Nothing"])
        if draws.random() < 0.1:
            torn = bytearray(message[: draws.randrange(len(message) + 1)])
            if torn:
                torn[draws.randrange(len(torn))] = draws.randrange(256)
            yield method, bytes(torn), None
        elif method == "Segment":
            only = reward_pb2.SegmentRequest(
                request_id=request.request_id, image=request.image, frame=request.frame, candidates=request.candidates
            )
            yield method, only.SerializeToString(), request
        else:
            yield method, message, request


def check(method: str, request: reward_pb2.ScoreRequest | None, call: grpc.Future) -> str:
    """Gives the call's status; what is no proper answer fails the test."""
    error = call.exception()
    if error is not None:
        code, details = error.code(), error.details()
        if method == "Nothing":
            assert code is grpc.StatusCode.UNIMPLEMENTED
        elif code is grpc.StatusCode.INTERNAL:
            # gRPC's own word for bytes that are no message.
            assert request is None
            assert details == "Exception deserializing request!"
        else:
            assert code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
            assert details
            assert "\n" not in details
        return code.name
    answer = call.result()
    if request is not None:
        assert answer.request_id == request.request_id
        assert len(answer.candidates) == len(request.candidates)
    for entry in answer.candidates:
        assert entry.status.code in {0, 3, 11}
        assert bool(entry.status.message) == (entry.status.code != 0)
        assert math.isfinite(entry.model_score)
        if isinstance(entry, reward_pb2.CandidateScore):
            assert 0 <= entry.intersection <= entry.union
            assert 0 <= entry.iou <= 1
    return "OK"


def test_every_request_gets_a_proper_answer() -> None:
    with serving() as (server, stub):
        good = group_request(7)
        before = stub.Score(good)
        with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", 2**25)]) as channel:
            kinds = {"Segment": reward_pb2.SegmentResponse.FromString}
            calls: dict[str, Callable[..., grpc.Future]] = {
                method: channel.unary_unary(
                    f"/{SERVICE_NAME}/{method}",
                    response_deserializer=kinds.get(method, reward_pb2.ScoreResponse.FromString),
                ).future
                for method in ("Score", "Segment", "Nothing")
            }
            codes: Counter[str] = Counter()
            waiting: deque[tuple[str, reward_pb2.ScoreRequest | None, grpc.Future]] = deque()
            for method, message, request in fuzzed(seed=4):
                if len(waiting) == 32:
                    codes[check(*waiting.popleft())] += 1
                waiting.append((method, request, calls[method](message, timeout=HANGS_AFTER_S)))
            codes.update(check(*item) for item in waiting)
        assert codes.total() == REQUESTS
        # All kinds of ends were met, and a good part came through to the model.
        assert min(codes[name] for name in ("OK", "INVALID_ARGUMENT", "UNIMPLEMENTED")) >= 1000
        assert min(codes[name] for name in ("FAILED_PRECONDITION", "INTERNAL")) >= 50
        assert stub.Score(good) == before
