"""The gRPC face: checks requests, hands them to the worker, words the answers."""

import hashlib
import logging
import math
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

import grpc
import numpy as np

from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.codec import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, CodecError, decode_image, decode_mask, encode_mask
from reward_server.segmenter import Embedding, Prompt
from reward_server.worker import Job, Outcome, Worker

MAX_CANDIDATES = 256
MAX_OBJECTS = 256
MAX_POINTS = 16
# Farther from the picture than this, in pixels of the request's frame, no policy means anything, and float32 overflows.
_FARTHEST = 1e6

_log = logging.getLogger(__name__)


class RequestError(Exception):
    """A request that has no answer: the call's status code and one line of reason."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """The three calls of reward.proto. Until ``ready`` is called, only GetInfo answers."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def ready(self, worker: Worker) -> None:
        """Serves with this worker from now on."""
        self._worker = worker

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        try:
            return self._score(request, context)
        except RequestError as error:
            _refuse(request.request_id, error, context)

    def Segment(self, request: reward_pb2.SegmentRequest, context: grpc.ServicerContext) -> reward_pb2.SegmentResponse:
        try:
            return self._segment(request, context)
        except RequestError as error:
            _refuse(request.request_id, error, context)

    def GetInfo(self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext) -> reward_pb2.GetInfoResponse:
        info = reward_pb2.GetInfoResponse(
            api_version=reward_pb2.API_VERSION_CURRENT,
            server_version=_installed("segzero-jax"),
            limits=reward_pb2.Limits(
                image_bytes=MAX_IMAGE_BYTES,
                image_pixels=MAX_IMAGE_PIXELS,
                candidates=MAX_CANDIDATES,
                objects_per_candidate=MAX_OBJECTS,
                points_per_object=MAX_POINTS,
            ),
            libraries={name: _installed(name) for name in ("torch", "sam2")},
        )
        if self._worker is not None:
            segmenter = self._worker.segmenter
            info.model, info.checkpoint_sha256 = segmenter.name, segmenter.checkpoint_sha256
            info.dtype, info.device = segmenter.dtype, str(segmenter.device)
        return info

    def _score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        picture = _Picture(request.image, request.frame, self._loaded())
        candidates, statuses = picture.candidates(request.candidates)
        outcome = picture.run(candidates, picture.target(request.target), request.return_masks, context)
        response = reward_pb2.ScoreResponse(request_id=request.request_id, target_area=outcome.target_area)
        for i, status in enumerate(statuses):
            entry = response.candidates.add(status=status)
            if status.code == 0:
                entry.intersection, entry.union = outcome.intersections[i], outcome.unions[i]
                entry.iou = entry.intersection / entry.union if entry.union else 1.0
                entry.model_score = outcome.scores[i]
                if outcome.masks is not None:
                    entry.mask.CopyFrom(encode_mask(outcome.masks[i]))
        return response

    def _segment(self, request: reward_pb2.SegmentRequest, context: grpc.ServicerContext) -> reward_pb2.SegmentResponse:
        picture = _Picture(request.image, request.frame, self._loaded())
        candidates, statuses = picture.candidates(request.candidates)
        outcome = picture.run(candidates, None, True, context)
        assert outcome.masks is not None
        response = reward_pb2.SegmentResponse(request_id=request.request_id)
        for i, status in enumerate(statuses):
            entry = response.candidates.add(status=status)
            if status.code == 0:
                entry.mask.CopyFrom(encode_mask(outcome.masks[i]))
                entry.model_score = outcome.scores[i]
        return response

    def _loaded(self) -> Worker:
        if self._worker is None:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the model is still loading")
        return self._worker


class _Picture:
    """A request's image, checked, with what is asked about it brought into its pixels."""

    def __init__(self, image: reward_pb2.Image, frame: reward_pb2.Frame, worker: Worker) -> None:
        self._worker = worker
        self._key = image.sha256
        self._embedding: Embedding | None = worker.embeddings.get(image.sha256)
        self._pixels: np.ndarray | None = None
        if len(image.sha256) != hashlib.sha256().digest_size:
            raise _invalid(f"image.sha256: {len(image.sha256)} bytes, expected 32")
        if image.data and hashlib.sha256(image.data).digest() != image.sha256:
            raise _invalid(f"image: its {len(image.data)} bytes do not have the stated SHA-256")
        if self._embedding is not None:
            self.height, self.width = self._embedding.height, self._embedding.width
        elif image.data:
            try:
                self._pixels = decode_image(image.data)
            except CodecError as error:
                raise _invalid(str(error)) from None
            self.height, self.width = self._pixels.shape[:2]
        else:
            raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, "image: not cached, send it again with its bytes")
        if frame.width <= 0 or frame.height <= 0:
            raise _invalid(f"frame: {frame.width} x {frame.height}, expected a positive width and height")
        self._scale = (self.width / frame.width, self.height / frame.height)

    def candidates(
        self, candidates: Sequence[reward_pb2.Candidate]
    ) -> tuple[list[tuple[Prompt, ...]], list[reward_pb2.Status]]:
        """Each candidate's prompts and status; one that is refused asks for nothing and spoils no other."""
        if len(candidates) > MAX_CANDIDATES:
            raise _invalid(f"candidates: {len(candidates)}, expected at most {MAX_CANDIDATES}")
        prompts: list[tuple[Prompt, ...]] = []
        statuses = []
        for candidate in candidates:
            try:
                prompts.append(self._prompts(candidate))
                statuses.append(reward_pb2.Status())
            except ValueError as error:
                prompts.append(())
                statuses.append(reward_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=str(error)))
        return prompts, statuses

    def target(self, target: reward_pb2.Target) -> np.ndarray | tuple[Prompt, ...]:
        """The target mask, bool [height, width], or the prompts that it is made from."""
        try:
            if target.WhichOneof("kind") == "mask":
                return decode_mask(target.mask, self.height, self.width)
            if target.WhichOneof("kind") == "objects":
                return self._prompts(target.objects)
        except ValueError as error:
            raise _invalid(f"target: {error}") from None
        raise _invalid("target: missing, expected a mask or objects")

    def run(
        self,
        candidates: Sequence[Sequence[Prompt]],
        target: np.ndarray | tuple[Prompt, ...] | None,
        want_masks: bool,
        context: grpc.ServicerContext,
    ) -> Outcome:
        """Waits for the worker's answer."""
        job = Job(self._key, self._pixels, self._embedding, candidates, target, want_masks, context.is_active)
        outcome = self._worker.run(job)
        if outcome is None:
            raise RequestError(grpc.StatusCode.CANCELLED, "nobody waited for the answer any more")
        return outcome

    def _prompts(self, candidate: reward_pb2.Candidate) -> tuple[Prompt, ...]:
        """Prompts in pixels of the image; raises ValueError for what SAM 2 cannot be asked."""
        if len(candidate.objects) > MAX_OBJECTS:
            raise ValueError(f"{len(candidate.objects)} objects, expected at most {MAX_OBJECTS}")
        return tuple(self._prompt(item, f"objects[{i}]") for i, item in enumerate(candidate.objects))

    def _prompt(self, item: reward_pb2.ObjectPrompt, name: str) -> Prompt:
        if not item.HasField("box"):
            raise ValueError(f"{name}: has no box")
        if len(item.points) > MAX_POINTS:
            raise ValueError(f"{name}: {len(item.points)} points, expected at most {MAX_POINTS}")
        corners = [(item.box.x1, item.box.y1), (item.box.x2, item.box.y2)]
        spots = corners + [(point.x, point.y) for point in item.points]
        for value in (v for spot in spots for v in spot):
            # Written so that NaN, which compares false with everything, is refused too.
            if not math.fabs(value) <= _FARTHEST:
                raise ValueError(
                    f"{name}: coordinate {value}, expected a number between -{_FARTHEST:g} and {_FARTHEST:g}"
                )
        across, down = self._scale
        (x1, y1), (x2, y2), *points = [(x * across, y * down) for x, y in spots]
        return Prompt((x1, y1, x2, y2), tuple(points))


def _invalid(reason: str) -> RequestError:
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, reason)


def _refuse(request_id: str, error: RequestError, context: grpc.ServicerContext) -> NoReturn:
    """Ends the call with the error's status."""
    _log.warning("request %r refused: %s: %s", request_id, error.code.name, error.reason)
    context.abort(error.code, error.reason)
    raise AssertionError("abort raises")


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
