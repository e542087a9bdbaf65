"""The SAM 2 service: masks as the plain predictor's, scores as counted by hand, refusals with a reason."""

import hashlib
import io
import math
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from reward_server import codec, reward_pb2, reward_pb2_grpc, service
from reward_server.codec import CodecError, decode_image, decode_mask, encode_mask
from reward_server.segmenter import TOY, ModelError, Prompt, Segmenter
from reward_server.server import SERVICE_NAME, RewardServer
from reward_server.worker import Embeddings
from segzero_jax.data.scenes import Scene, make_example_scene

# Batching changes the order of float32 sums: a pixel whose logit is nearly zero may fall on the other side.
PIXELS_APART = 5
SCORE_APART = 1e-4


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.set_num_threads(1)
    return Segmenter.load("toy", "cpu")


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    server = RewardServer()
    server.load("toy", "cpu")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stub(server: RewardServer) -> Iterator[reward_pb2_grpc.RewardServiceStub]:
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", 2**25)]) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


def scene(index: int = 0) -> Scene:
    return make_example_scene("val", index)[0]


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def image_message(data: bytes) -> reward_pb2.Image:
    return reward_pb2.Image(data=data, sha256=hashlib.sha256(data).digest())


def candidate(*prompts: Prompt) -> reward_pb2.Candidate:
    message = reward_pb2.Candidate()
    for prompt in prompts:
        x1, y1, x2, y2 = prompt.box
        points = [reward_pb2.Point(x=x, y=y) for x, y in prompt.points]
        message.objects.add(box=reward_pb2.Box(x1=x1, y1=y1, x2=x2, y2=y2), points=points)
    return message


def prompts_of(scene: Scene, points: int = 1, shift: float = 0.0) -> list[Prompt]:
    made = []
    for item in scene.objects:
        box = tuple(float(v) + shift for v in item.box)
        spots = (item.point, (item.point[0] + 3, item.point[1] + 2))[:points]
        made.append(Prompt(box, tuple((float(x), float(y)) for x, y in spots)))
    return made


def request_for(scene: Scene, *candidates: reward_pb2.Candidate) -> reward_pb2.ScoreRequest:
    height, width = scene.image.shape[:2]
    return reward_pb2.ScoreRequest(
        request_id="a request",
        image=image_message(encoded(scene.image)),
        frame=reward_pb2.Frame(width=width, height=height),
        target=reward_pb2.Target(mask=encode_mask(scene.objects[0].mask)),
        candidates=candidates,
    )


def plain_mask(segmenter: Segmenter, prompt: Prompt) -> tuple[np.ndarray, float]:
    masks, scores, _ = segmenter.predictor.predict(
        point_coords=np.array(prompt.points) if prompt.points else None,
        point_labels=np.ones(len(prompt.points)) if prompt.points else None,
        box=np.array(prompt.box),
        multimask_output=True,
    )
    return masks[scores.argmax()] > 0, float(scores.max())


class TestMasks:
    @pytest.mark.parametrize("points", [0, 1, 2])
    def test_equal_the_plain_predictors_box_by_box(self, segmenter: Segmenter, points: int) -> None:
        compared = 0
        for index in range(4):
            picture = scene(index)
            prompts = [p for shift in (0.0, 4.7, -11.3) for p in prompts_of(picture, points, shift)]
            found = segmenter.segment(segmenter.embed(picture.image), [[prompt] for prompt in prompts])
            segmenter.predictor.set_image(picture.image)
            for mask, score, prompt in zip(found.masks.numpy(), found.scores, prompts, strict=True):
                expected, expected_score = plain_mask(segmenter, prompt)
                assert (mask != expected).sum() <= PIXELS_APART
                assert score == pytest.approx(expected_score, abs=SCORE_APART)
                compared += 1
        assert compared >= 12

    def test_do_not_depend_on_neighbours_with_other_point_counts(self, segmenter: Segmenter) -> None:
        embedding = segmenter.embed(scene().image)
        mixed = [prompts_of(scene(), points)[0] for points in (0, 1, 2, 1, 0)]
        together = segmenter.segment(embedding, [[prompt] for prompt in mixed])
        for i, prompt in enumerate(mixed):
            alone = segmenter.segment(embedding, [[prompt]])
            assert (together.masks[i] != alone.masks[0]).sum() <= PIXELS_APART
            assert together.scores[i] == pytest.approx(alone.scores[0], abs=SCORE_APART)

    def test_of_a_candidate_are_the_union_over_its_objects(self, segmenter: Segmenter) -> None:
        picture = next(scene(i) for i in range(20) if len(scene(i).objects) >= 3)
        embedding, prompts = segmenter.embed(picture.image), prompts_of(picture)
        one_by_one = segmenter.segment(embedding, [[prompt] for prompt in prompts])
        joined = segmenter.segment(embedding, [prompts, [], prompts[:2]])
        assert (joined.masks[0] != one_by_one.masks.any(0)).sum() <= PIXELS_APART * len(prompts)
        assert not joined.masks[1].any()
        assert joined.scores[0] == pytest.approx(np.mean(one_by_one.scores), abs=SCORE_APART)
        assert joined.scores[1] == 0

    def test_take_one_decoder_call_for_a_group(self, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = []
        handle = segmenter.model.sam_mask_decoder.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(len(kwargs["sparse_prompt_embeddings"])), with_kwargs=True
        )
        embedding, prompt = segmenter.embed(scene().image), prompts_of(scene())[0]
        try:
            whole = segmenter.segment(embedding, [[prompt, prompt]] * 8)
            assert batches == [16]
            # Past the bound on memory the call is cut, and nothing else changes.
            monkeypatch.setattr("reward_server.segmenter._PROMPTS_PER_CALL", 5)
            parts = segmenter.segment(embedding, [[prompt, prompt]] * 8)
        finally:
            handle.remove()
        assert batches == [16, 5, 5, 5, 1]
        assert (whole.masks != parts.masks).sum() <= PIXELS_APART * 8


class TestToyModel:
    def test_finds_objects_it_has_not_seen_and_follows_the_box(self, segmenter: Segmenter) -> None:
        exact, near, far = [], [], []
        for index in range(25):
            picture, question = make_example_scene("val", index)
            item = picture.objects[question.answer]
            side = (item.box[2] - item.box[0]) / 2
            segmenter.predictor.set_image(picture.image)
            for ious, shift in ((exact, 0.0), (near, 0.1 * side), (far, 1.2 * side)):
                prompt = prompts_of(picture, 1, shift)[question.answer]
                found, _ = plain_mask(segmenter, Prompt(prompt.box, ((float(item.point[0]), float(item.point[1])),)))
                ious.append((found & item.mask).sum() / (found | item.mask).sum())
        assert np.mean(exact) >= 0.80
        assert np.mean(near) >= 0.75
        assert np.mean(far) <= np.mean(exact) - 0.2

    def test_ships_small(self) -> None:
        assert sum(path.stat().st_size for path in TOY.iterdir()) < 4 * 2**20

    def test_refuses_what_it_cannot_load(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"'facebook/sam3'.*expected toy"):
            Segmenter.load("facebook/sam3", "cpu")
        with pytest.raises(ModelError, match=r"has no config\.yaml"):
            Segmenter.load(str(tmp_path), "cpu")
        (tmp_path / "config.yaml").write_text(
            (TOY / "config.yaml").read_text().replace("embed_dim: 16", "embed_dim: 32")
        )
        (tmp_path / "model.safetensors").write_bytes((TOY / "model.safetensors").read_bytes())
        with pytest.raises(ModelError) as refused:
            Segmenter.load(str(tmp_path), "cpu")
        assert "\n" not in str(refused.value)


class TestScore:
    def test_counts_pixels_as_numpy_does(self, stub: reward_pb2_grpc.RewardServiceStub) -> None:
        picture = next(scene(i) for i in range(20) if len(scene(i).objects) >= 2)
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
        picture = next(scene(i) for i in range(20) if len(scene(i).objects) >= 2)
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

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e7])
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
        assert re.fullmatch(r"objects\[0\]: coordinate .*, expected a number between .*", entries[0].status.message)
        assert "objects[1]" in entries[2].status.message
        assert "no box" in entries[3].status.message
        assert entries[1].iou == pytest.approx(alone.iou, abs=1e-3)

    def test_encodes_a_picture_once_and_knows_it_by_its_hash(
        self, server: RewardServer, stub: reward_pb2_grpc.RewardServiceStub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segmenter = server._worker.segmenter
        encodings = []
        embed = segmenter.embed
        monkeypatch.setattr(segmenter, "embed", lambda image: encodings.append(1) or embed(image))
        picture = scene(31)
        request = request_for(picture, *[candidate(prompts_of(picture, 1, shift)[0]) for shift in range(8)])
        by_hash = reward_pb2.ScoreRequest()
        by_hash.CopyFrom(request)
        by_hash.image.ClearField("data")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Score(by_hash)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        first = stub.Score(request)
        assert encodings == [1]
        again = stub.Score(by_hash)
        assert encodings == [1]
        assert first == again

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
        (b"not a picture", "not a whole JPEG, PNG or WebP"),
        (whole[: len(whole) // 2], "not a whole JPEG, PNG or WebP"),
        (encoded(scene().image, "GIF"), "not a whole JPEG, PNG or WebP"),
        (huge, "image: "),
        (b"\0" * (codec.MAX_IMAGE_BYTES + 1), "expected at most"),
    ]


class TestRefusals:
    @pytest.mark.parametrize("case", range(5))
    def test_of_pictures(self, stub: reward_pb2_grpc.RewardServiceStub, case: int) -> None:
        data, reason = damaged_pictures()[case]
        request = request_for(scene(), candidate())
        request.image.CopyFrom(image_message(data))
        assert_refused(stub, request, reason)

    def test_of_large_pictures_before_they_are_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codec, "MAX_IMAGE_PIXELS", 100)
        monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
        with pytest.raises(CodecError, match=r"11 x 10 pixels, expected at most 100"):
            decode_image(encoded(np.zeros((10, 11, 3), np.uint8)))

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
            (broken(target=other), "target: mask: 5 x 7 pixels, expected the image's"),
            (broken(target=torn), "target: mask: "),
            (broken(target=reward_pb2.Target()), "target: missing"),
            (broken(target=reward_pb2.Target(objects=candidate(Prompt((math.nan, 0, 1, 1))))), "target: objects[0]: "),
        ]
        for request, reason in cases:
            assert_refused(stub, request, reason)
        good.candidates.extend([candidate()] * service.MAX_CANDIDATES)
        assert_refused(stub, good, f"candidates: {service.MAX_CANDIDATES + 1}, expected at most")

    def test_of_calls_before_the_model_is_there(self) -> None:
        server = RewardServer()
        try:
            with grpc.insecure_channel(server.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                stub = reward_pb2_grpc.RewardServiceStub(channel)
                for name in ("", SERVICE_NAME):
                    answer = health.Check(health_pb2.HealthCheckRequest(service=name))
                    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Score(request_for(scene(), candidate()))
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
                assert stub.GetInfo(reward_pb2.GetInfoRequest()).model == ""
                server.load("toy", "cpu")
                answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                info = stub.GetInfo(reward_pb2.GetInfoRequest())
                assert (info.model, info.device, info.dtype) == ("toy", "cpu", "float32")
                assert info.api_version == reward_pb2.API_VERSION_CURRENT
                weights = (TOY / "model.safetensors").read_bytes()
                assert info.checkpoint_sha256 == hashlib.sha256(weights).hexdigest()
        finally:
            server.stop()

    def test_of_a_port_that_is_taken(self, server: RewardServer) -> None:
        host, _, port = server.address.partition(":")
        with pytest.raises(OSError, match=f"cannot listen on {server.address}"):
            RewardServer(host, int(port))


def assert_refused(stub: reward_pb2_grpc.RewardServiceStub, request: reward_pb2.ScoreRequest, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Score(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in refused.value.details()
    assert "\n" not in refused.value.details()


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


class TestCodec:
    @settings(deadline=None)
    @given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**32 - 1))
    def test_masks_come_back(self, height: int, width: int, share: float, seed: int) -> None:
        mask = np.random.default_rng(seed).random((height, width)) < share
        assert (decode_mask(encode_mask(mask), height, width) == mask).all()

    def test_large_masks_are_read_as_pycocotools_reads_them(self) -> None:
        rows, columns = np.mgrid[:840, :700]
        for mask in ((rows - 300) ** 2 + (columns - 400) ** 2 < 9e4, rows > 600, (rows + columns) % 97 < 50):
            rle = encode_mask(mask)
            expected = coco.decode({"size": [840, 700], "counts": rle.counts.encode()})
            assert (decode_mask(rle, 840, 700) == expected).all()
            assert (expected == mask).all()

    @settings(deadline=None)
    @given(st.one_of(st.text(max_size=30), st.text([chr(c) for c in range(48, 112)], max_size=12)))
    def test_only_whole_masks_are_read(self, counts: str) -> None:
        try:
            mask = decode_mask(reward_pb2.Rle(height=3, width=2, counts=counts), 3, 2)
        except CodecError:
            pass  # Refusing is the other right answer; anything else is raised.
        else:
            assert mask.shape == (3, 2)
            assert (decode_mask(encode_mask(mask), 3, 2) == mask).all()

    def test_short_runs_are_refused(self) -> None:
        whole = encode_mask(np.eye(9, 6, dtype=bool))
        for end in range(len(whole.counts)):
            with pytest.raises(CodecError):
                decode_mask(reward_pb2.Rle(height=9, width=6, counts=whole.counts[:end]), 9, 6)

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
    def test_damaged_pictures_are_read_or_refused(self, kind: str, data: st.DataObject) -> None:
        damaged = bytearray(encoded(scene().image[:40, :50], kind))
        for _ in range(data.draw(st.integers(1, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        try:
            pixels = decode_image(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))
        except CodecError:
            pass
        else:
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_colour_mode_becomes_rgb(self, mode: str) -> None:
        file = io.BytesIO()
        Image.fromarray(scene().image).convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
        assert decode_image(file.getvalue()).shape == scene().image.shape


def test_embeddings_are_forgotten_by_bytes(segmenter: Segmenter) -> None:
    embedding = segmenter.embed(scene().image)
    kept = Embeddings(max_bytes=2 * embedding.nbytes)
    kept.put(b"a", embedding)
    kept.put(b"b", embedding)
    assert kept.get(b"a") is embedding
    kept.put(b"c", embedding)
    assert kept.get(b"b") is None
    assert kept.get(b"a") is embedding
    assert kept.get(b"c") is embedding
    Embeddings(max_bytes=embedding.nbytes - 1).put(b"a", embedding)


def test_stubs_say_what_the_proto_says() -> None:
    """Reads reward.proto as text and compares every message, field, enum and call with the generated descriptors."""
    text = resources.files("reward_server").joinpath("reward.proto").read_text()
    text = re.sub(r"//.*", "", text)
    assert re.search(r"package ([\w.]+);", text)[1] == reward_pb2.DESCRIPTOR.package
    written = {}
    for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text):
        choice = {f for inner in re.findall(r"oneof \w+ \{([^}]*)\}", body) for f in re.findall(r"(\w+) = \d+;", inner)}
        fields = re.findall(r"(repeated )?(map<\w+, \w+>|[\w.]+) (\w+) = (\d+);", body)
        written[name] = {(f, int(n), kind, bool(many), f in choice) for many, kind, f, n in fields}
    generated = {
        name: {(f.name, f.number, *kind_of(f), f.containing_oneof is not None) for f in message.fields}
        for name, message in reward_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert written == generated
    enums = {n: dict(re.findall(r"(\w+) = (\d+);", b)) for n, b in re.findall(r"enum (\w+) \{([^}]*)\}", text)}
    assert enums == {
        name: {value.name: str(value.number) for value in enum.values}
        for name, enum in reward_pb2.DESCRIPTOR.enum_types_by_name.items()
    }
    calls = set(re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\)", text))
    service = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
    assert calls == {(m.name, m.input_type.name, m.output_type.name) for m in service.methods}
    typed = resources.files("reward_server").joinpath("reward_pb2_grpc.pyi").read_text()
    assert {name for name, _, _ in calls} == set(re.findall(r"(\w+): grpc\.UnaryUnaryMultiCallable", typed))


def kind_of(field: object) -> tuple[str, bool]:
    """A field's type as a proto file writes it, and whether it is repeated."""
    names = {1: "double", 3: "int64", 5: "int32", 8: "bool", 9: "string", 12: "bytes"}
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        key, value = (kind_of(message.fields_by_name[name])[0] for name in ("key", "value"))
        return f"map<{key}, {value}>", False
    return (message.name if message is not None else names[field.type]), field.is_repeated


def test_server_process_imports_no_jax() -> None:
    check = (
        "import sys, reward_server.server, reward_server.__main__; "
        "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'flax', 'segzero_jax')])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
