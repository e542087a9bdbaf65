"""Score, Segment and GetInfo: counted as numpy counts, refused with a reason."""

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from sam_calls import (
    candidate,
    encoded,
    group_request,
    image_message,
    prompts_of,
    request_for,
    scene,
    scene_with,
    serving,
)

from reward_server import codec, reward_pb2, reward_pb2_grpc, validation
from reward_server.codec import decode_mask, encode_mask
from reward_server.segmenter import Decoded, Prompt, Segmenter
from reward_server.server import RewardServer
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import ScoreRequest
from segzero_jax.types import Frame, ObjectPrompt, RleMask


@pytest.fixture(scope="module")
def stub() -> Iterator[reward_pb2_grpc.RewardServiceStub]:
    with serving() as (_, stub):
        yield stub


def encodings(server: RewardServer) -> float:
    return server.metrics.registry.get_sample_value("segzero_reward_images_encoded_total")


class TestScore:
    def test_counts_pixels_as_numpy_does(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        picture = scene_with(2)
        first, second = prompts_of(picture)[:2]
        request = request_for(picture, candidate(first), candidate(second), candidate(first, second), candidate())
        request.return_masks = True
        answer = stub.Score(request)
        assert answer.request_id == "a request"
        target = picture.objects[0].mask
        assert answer.target_area == target.sum()
        assert [entry.status.code for entry in answer.candidates] == [0] * 4
        for entry in answer.candidates:
            mask = decode_mask(entry.mask, *target.shape)
            assert entry.intersection == (mask & target).sum()
            assert entry.union == (mask | target).sum()
            assert entry.iou == entry.intersection / entry.union
        ious = [entry.iou for entry in answer.candidates]
        # The target is the first object: a second one beside it can only take away.
        assert ious[0] > 0.8
        assert ious[0] > ious[2] > ious[1]
        assert ious[1] < 0.05
        assert ious[3] == 0
        assert answer.candidates[0].model_score > 0.3
        assert not stub.Score(request_for(picture, candidate(first))).candidates[0].HasField("mask")

    def test_against_objects_uses_their_mask(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        picture = scene_with(2)
        first, second = prompts_of(picture)[:2]
        request = request_for(picture, candidate(first), candidate(second), candidate())
        request.target.objects.CopyFrom(candidate(first))
        same, other, nothing = stub.Score(request).candidates
        assert same.iou >= 0.99
        assert other.iou < 0.1
        assert nothing.iou == 0
        request.target.objects.CopyFrom(candidate())
        wrong, _, empty = stub.Score(request).candidates
        assert wrong.iou == 0
        assert empty.iou == 1

    def test_ignored_pixels_count_in_no_mask(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        """Half of the target and what lies around it, with the target given as a mask and as objects."""
        picture = scene_with(2)
        first, second = prompts_of(picture)[:2]
        height, width = picture.image.shape[:2]
        ignored = np.zeros((height, width), bool)
        ignored[:, : int(first.points[0][0])] = True
        outside = candidate(Prompt((width + 1, 5, width + 50, 40)))
        request = request_for(picture, candidate(first), candidate(first, second), candidate(), outside)
        request.return_masks = True
        whole = stub.Score(request)
        request.ignore.CopyFrom(encode_mask(ignored))
        for objects in (False, True):
            target = picture.objects[0].mask
            if objects:
                request.target.objects.CopyFrom(candidate(first))
                target = decode_mask(whole.candidates[0].mask, height, width)
            answer = stub.Score(request)
            assert 0 < answer.target_area == (target & ~ignored).sum() < target.sum()
            for entry, before in zip(answer.candidates[:3], whole.candidates, strict=False):
                assert entry.mask == before.mask
                mask = decode_mask(entry.mask, height, width)
                assert entry.intersection == (mask & target & ~ignored).sum()
                assert entry.union == ((mask | target) & ~ignored).sum()
                assert entry.iou == entry.intersection / entry.union
            assert (answer.candidates[3].status.code, answer.candidates[3].union) == (11, answer.target_area)
        # Of a target that is ignored as a whole nobody can find anything; where nothing is meant, nothing is right.
        request.ignore.CopyFrom(encode_mask(np.ones_like(ignored)))
        hidden = stub.Score(request)
        assert (hidden.target_area, [entry.iou for entry in hidden.candidates]) == (0, [0.0] * 4)
        request.target.mask.CopyFrom(encode_mask(picture.objects[0].mask))
        assert [entry.iou for entry in stub.Score(request).candidates] == [0.0] * 4
        request.target.mask.CopyFrom(encode_mask(np.zeros_like(ignored)))
        assert [entry.iou for entry in stub.Score(request).candidates] == [1.0, 1.0, 1.0, 0.0]

    def test_reads_coordinates_in_the_stated_frame(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        picture = scene()
        height, width = picture.image.shape[:2]
        prompt = prompts_of(picture)[0]
        across, down = 840 / width, 840 / height
        x1, y1, x2, y2 = prompt.box
        points = tuple((x * across, y * down) for x, y in prompt.points)
        scaled = request_for(picture, candidate(Prompt((x1 * across, y1 * down, x2 * across, y2 * down), points)))
        scaled.frame.width = scaled.frame.height = 840
        as_stored = stub.Score(request_for(picture, candidate(prompt))).candidates[0]
        assert stub.Score(scaled).candidates[0].iou == pytest.approx(as_stored.iou, abs=1e-3)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_refuses_one_candidate_and_not_its_neighbours(
        self, stub: reward_pb2_grpc.RewardServiceStub, value: float
    ) -> None:
        picture = scene()
        prompt = prompts_of(picture)[0]
        alone = stub.Score(request_for(picture, candidate(prompt))).candidates[0]
        in_box = candidate(Prompt((value, 1, 2, 3)))
        in_point = candidate(prompt, Prompt((1, 1, 9, 9), ((5, value),)))
        without_box = reward_pb2.Candidate(objects=[reward_pb2.ObjectPrompt()])
        entries = stub.Score(request_for(picture, in_box, candidate(prompt), in_point, without_box)).candidates
        assert [entry.status.code for entry in entries] == [3, 0, 3, 3]
        assert re.fullmatch(r"objects\[0\]: coordinate .*, expected a finite number", entries[0].status.message)
        assert "objects[1]" in entries[2].status.message
        assert "no box" in entries[3].status.message
        assert entries[1].iou == pytest.approx(alone.iou, abs=1e-3)

    def test_refuses_prompts_outside_the_picture_with_a_code_of_their_own(
        self, stub: reward_pb2_grpc.RewardServiceStub
    ) -> None:
        picture = scene()
        height, width = picture.image.shape[:2]
        outside = [
            Prompt((width + 1, 5, width + 50, 40)),
            Prompt((5, -40, 30, -1)),
            Prompt((5, 5, 30, 1e7)),
            Prompt((5, 5, 30, 40), ((width + 0.5, 20),)),
            Prompt((5, 5, 30, 40), ((20, 20), (20, -0.5))),
            Prompt((-1e7, 5, 30, 40)),
        ]
        inside = [
            Prompt((-30, -20, 40, 50), ((0, 0),)),
            Prompt((40, 50, -30, -20), ((width, height),)),
            Prompt((width, height, width + 9, height + 9)),
            Prompt((-9, -9, 0, 0)),
        ]
        entries = stub.Score(request_for(picture, *map(candidate, outside + inside))).candidates
        assert [entry.status.code for entry in entries] == [11] * len(outside) + [0] * len(inside)
        # They select nothing: a score of zero, which a trainer need not count as missing.
        area = picture.objects[0].mask.sum()
        assert {(e.intersection, e.union, e.iou) for e in entries[: len(outside)]} == {(0, area, 0.0)}
        assert (
            entries[0].status.message
            == f"objects[0]: box ({width + 1}, 5, {width + 50}, 40) lies outside the frame of {width} x {height}"
        )
        assert entries[4].status.message == f"objects[0]: point (20, -0.5) lies outside the frame of {width} x {height}"

    @pytest.mark.parametrize("score", [math.nan, math.inf])
    def test_never_gives_a_score_that_is_no_number(self, score: float, monkeypatch: pytest.MonkeyPatch) -> None:
        segmenter = Segmenter.load("toy", "cpu")
        with serving(segmenters=[segmenter]) as (_, stub):
            good = stub.Score(group_request(0, 3)).candidates
            decode = segmenter.decode

            def spoiled(*arguments: object) -> Decoded:
                decoded = decode(*arguments)
                decoded.scores[1] = score
                return decoded

            monkeypatch.setattr(segmenter, "decode", spoiled)
            entries = stub.Score(group_request(0, 3)).candidates
        assert [entry.status.code for entry in entries] == [0, 13, 0]
        assert entries[1].status.message == f"SAM 2 gave the score {score}"
        assert (entries[1].iou, entries[1].union) == (0, 0)
        assert [entries[0], entries[2]] == [good[0], good[2]]

    def test_encodes_a_picture_once_and_knows_it_by_its_hash(self) -> None:
        with serving() as (server, stub):
            request = group_request(31)
            by_hash = reward_pb2.ScoreRequest()
            by_hash.CopyFrom(request)
            by_hash.image.ClearField("data")
            with pytest.raises(grpc.RpcError) as refused:
                stub.Score(by_hash)
            assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            first = stub.Score(request)
            assert encodings(server) == 1
            again = stub.Score(by_hash)
            assert encodings(server) == 1
            assert first == again
            # Bytes that do not have the stated hash are refused, known or not.
            request.image.data += b"0"
            with pytest.raises(grpc.RpcError) as refused:
                stub.Score(request)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    def test_takes_a_large_noisy_picture(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (840, 840, 3), dtype=np.uint8)
        data = encoded(pixels)
        assert len(data) > 2_000_000
        request = reward_pb2.ScoreRequest(
            image=image_message(data), frame=reward_pb2.Frame(width=840, height=840), candidates=[candidate()]
        )
        request.target.objects.SetInParent()
        assert stub.Score(request).candidates[0].iou == 1


def damaged_pictures() -> list[tuple[bytes, str]]:
    whole = encoded(scene().image)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]
    return [
        (b"", "image: 0 bytes, expected a JPEG, PNG or WebP"),
        (b"not a picture", "not a whole JPEG, PNG or WebP"),
        (whole[: len(whole) // 2], "not a whole JPEG, PNG or WebP"),
        (encoded(scene().image, "GIF"), "not a whole JPEG, PNG or WebP"),
        (huge, "image: "),
        (b"\0" * (codec.MAX_IMAGE_BYTES + 1), "expected at most"),
    ]


class TestRefusals:
    @pytest.mark.parametrize("case", range(6))
    def test_of_pictures(self, stub: reward_pb2_grpc.RewardServiceStub, case: int) -> None:
        data, reason = damaged_pictures()[case]
        request = request_for(scene(), candidate())
        request.image.CopyFrom(image_message(data))
        assert_refused(stub, request, reason)

    def test_of_what_does_not_fit_together(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        good = request_for(scene(), candidate())

        def broken(**changes: object) -> reward_pb2.ScoreRequest:
            request = reward_pb2.ScoreRequest()
            request.CopyFrom(good)
            for name, value in changes.items():
                getattr(request, name).CopyFrom(value)
            return request

        other = reward_pb2.Target(mask=encode_mask(np.ones((7, 5), bool)))
        torn = reward_pb2.Target(mask=good.target.mask)
        torn.mask.counts = torn.mask.counts[:-3]
        cases = [
            (broken(image=reward_pb2.Image(data=good.image.data, sha256=b"\0" * 32)), "do not have the stated SHA-256"),
            (broken(image=reward_pb2.Image(data=good.image.data)), "image.sha256: 0 bytes, expected 32"),
            (broken(frame=reward_pb2.Frame(width=0, height=9)), "frame: 0 x 9, expected a positive"),
            (broken(frame=reward_pb2.Frame(width=9, height=0)), "frame: 9 x 0, expected a positive"),
            (broken(target=other), "target: mask: 5 x 7 pixels, expected the image's"),
            (broken(target=torn), "target: mask: "),
            (broken(ignore=other.mask), "ignore: mask: 5 x 7 pixels, expected the image's"),
            (broken(ignore=torn.mask), "ignore: mask: "),
            (broken(target=reward_pb2.Target()), "target: missing"),
            (broken(target=reward_pb2.Target(objects=candidate(Prompt((math.nan, 0, 1, 1))))), "target: objects[0]: "),
        ]
        for request, reason in cases:
            assert_refused(stub, request, reason)
        good.candidates.extend([candidate()] * validation.MAX_CANDIDATES)
        assert_refused(stub, good, f"candidates: {validation.MAX_CANDIDATES + 1}, expected at most")

    def test_of_more_than_one_request_may_ask(
        self, stub: reward_pb2_grpc.RewardServiceStub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt = Prompt((1, 1, 9, 9))
        many = request_for(scene(), *[candidate(*[prompt] * 250)] * 8)
        many.target.objects.CopyFrom(candidate(*[prompt] * 50))
        assert_refused(stub, many, "candidates and target: 2050 objects, expected at most 2048")
        crowded = stub.Score(request_for(scene(), candidate(*[prompt] * 257), candidate())).candidates
        assert [entry.status.code for entry in crowded] == [3, 0]
        assert crowded[0].status.message == "257 objects, expected at most 256"
        full = request_for(scene(), *[candidate(*[prompt] * 256)] * 8)
        _, statuses = validation.job_from(full, lambda sha256: None)
        assert [entry.code for entry in statuses] == [0] * 8, "as much as it may be, which a client's parts are"
        pointed = [candidate(Prompt((1, 1, 9, 9), ((5.0, 5.0),) * count)) for count in (16, 17)]
        most, more = stub.Score(request_for(scene(), *pointed)).candidates
        assert most.status.code == 0
        assert "17 points, expected at most 16" in more.status.message
        long = request_for(scene(), candidate(), request_id="x" * 257)
        assert_refused(stub, long, "request_id: 257 characters, expected at most 256")
        height, width = scene().image.shape[:2]
        monkeypatch.setattr(validation, "MAX_MASK_PIXELS", 3 * height * width)
        several = request_for(scene(), *[candidate(prompt)] * 4)
        assert_refused(stub, several, f"masks: 4 of {width} x {height} pixels, expected at most 3 of this size")
        stub.Score(request_for(scene(), *[candidate(prompt)] * 3, candidate()))
        # A mask that is asked for takes its room, whatever it is made of.
        empty = [request_for(scene(), *[candidate()] * count) for count in (3, 4)]
        for request in empty:
            request.return_masks = True
        assert len(stub.Score(empty[0]).candidates) == 3
        assert_refused(stub, empty[1], f"masks: 4 of {width} x {height} pixels, expected at most 3 of this size")

    def test_of_what_a_device_has_no_memory_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process may have it now: asking again helps, and when is said."""
        segmenter = Segmenter.load("toy", "cpu")

        def full(images: list[np.ndarray]) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with serving(segmenters=[segmenter]) as (_, stub):
            monkeypatch.setattr(segmenter, "embed", full)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Score(request_for(scene(), candidate()))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.details() == "out of memory on the device"
        assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


def assert_refused(stub: reward_pb2_grpc.RewardServiceStub, request: reward_pb2.ScoreRequest, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Score(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in refused.value.details()
    assert "\n" not in refused.value.details()


class TestAGroupThatIsMoreThanACallMayBe:
    """The trainer's client asks in parts: each candidate's score is what it is without the others."""

    @pytest.mark.parametrize(
        ("name", "limit", "masks"),
        [("MAX_MASK_PIXELS", 3, False), ("MAX_MASK_PIXELS", 2, True), ("MAX_REQUEST_OBJECTS", 3, False)],
    )
    def test_is_scored_but_for_what_is_too_much_by_itself(
        self, name: str, limit: int, masks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = (ObjectPrompt(prompt.box, prompt.points) for prompt in prompts_of(scene_with(2))[:2])
        answers = ((first,), (first, second), (), (second,) * 5, (first,), (second,), (second, second))
        with serving() as (server, _), RewardClient(server.address, 60) as client:
            group = ask_for(answers)
            client.wait_until_serving(60)
            (expected,) = client.score([group], masks=masks).result()
            height, width = scene_with(2).image.shape[:2]
            pixels = height * width if name == "MAX_MASK_PIXELS" else 1
            monkeypatch.setattr(validation, name, limit * pixels)
            client.wait_until_serving(60)
            (found,) = client.score([group], masks=masks).result()
        assert [score.iou for score in expected].count(None) == 0
        assert [score.iou is None for score in found] == [len(answer) > limit for answer in answers]
        assert f"expected at most {limit}" in found[3].error
        for mine, theirs, answer in zip(found, expected, answers, strict=True):
            if len(answer) <= limit:
                assert (mine.iou, mine.mask, mine.error) == (theirs.iou, theirs.mask, "")

    def test_ignores_the_same_pixels_in_every_part(self) -> None:
        first = prompts_of(scene_with(2))[0]
        group = ask_for(((ObjectPrompt(first.box, first.points),),) * 300)
        height, width = scene_with(2).image.shape[:2]
        everything = encode_mask(np.ones((height, width), bool))
        with serving() as (server, _), RewardClient(server.address, 60) as client:
            client.wait_until_serving(60)
            ignoring = replace(group, ignore=RleMask(height, width, everything.counts))
            (scores,) = client.score([ignoring]).result()
        assert {(score.iou, score.union) for score in scores} == {(0.0, 0)}
        assert len(scores) == 300

    def test_is_asked_in_parts_beyond_the_number_of_candidates(self) -> None:
        with serving() as (server, _), RewardClient(server.address, 60) as client:
            client.wait_until_serving(60)
            (scores,) = client.score([ask_for(((),) * 300)]).result()
        assert [score.iou for score in scores] == [0.0] * 300


def ask_for(answers: tuple[tuple[ObjectPrompt, ...], ...]) -> ScoreRequest:
    picture = scene_with(2)
    height, width = picture.image.shape[:2]
    target = encode_mask(picture.objects[0].mask)
    return ScoreRequest(
        "a group",
        encoded(picture.image),
        Frame(width, height),
        RleMask(height, width, target.counts),
        answers,
    )


class TestSegment:
    def test_gives_the_masks_that_are_scored(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        picture = scene()
        prompt = prompts_of(picture)[0]
        scored = request_for(picture, candidate(prompt), candidate(Prompt((math.nan, 0, 1, 1))))
        scored.return_masks = True
        asked = reward_pb2.SegmentRequest(
            request_id="masks", image=scored.image, frame=scored.frame, candidates=scored.candidates
        )
        expected, answer = stub.Score(scored), stub.Segment(asked)
        assert answer.request_id == "masks"
        assert answer.candidates[0].mask == expected.candidates[0].mask
        assert answer.candidates[0].model_score == expected.candidates[0].model_score
        assert answer.candidates[1].status == expected.candidates[1].status
        assert not answer.candidates[1].HasField("mask")
