"""Checks a request and makes a job of it: limits first, then hash and image, then each candidate separately."""

import hashlib
import math
from collections.abc import Callable, Sequence

import grpc
import numpy as np

from reward_server import reward_pb2
from reward_server.codec import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, CodecError, decode_image, decode_mask
from reward_server.engine import Job
from reward_server.segmenter import Embedding, Prompt

MAX_CANDIDATES = 256
MAX_OBJECTS = 256  # per candidate
MAX_POINTS = 16
MAX_REQUEST_OBJECTS = 2048
# Room for an answer and a target of 120 objects each, the most a policy is asked for, in the largest image.
MAX_MASK_PIXELS = 2**32
MAX_ID_CHARACTERS = 256
# Limit on coordinates, in pixels of the request's frame: no policy means anything farther away, and float32 overflows.
_FARTHEST = 1e6

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_OUT_OF_RANGE = grpc.StatusCode.OUT_OF_RANGE


class RequestError(Exception):
    """The request cannot be answered; has the call's status code and a reason of one line."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def limits() -> reward_pb2.Limits:
    """The limits of this server."""
    return reward_pb2.Limits(
        image_bytes=MAX_IMAGE_BYTES,
        image_pixels=MAX_IMAGE_PIXELS,
        candidates=MAX_CANDIDATES,
        objects_per_candidate=MAX_OBJECTS,
        points_per_object=MAX_POINTS,
        objects=MAX_REQUEST_OBJECTS,
        mask_pixels=MAX_MASK_PIXELS,
    )


def status(code: grpc.StatusCode = grpc.StatusCode.OK, reason: str = "") -> reward_pb2.Status:
    """A candidate's status."""
    return reward_pb2.Status(code=code.value[0], message=reason)


def job_from(
    request: reward_pb2.ScoreRequest | reward_pb2.SegmentRequest, find: Callable[[bytes], Embedding | None]
) -> tuple[Job, list[reward_pb2.Status]]:
    """Checks a request; returns the job for a device and each candidate's status.

    A refused candidate gets no prompts, and does not affect the others.

    Args:
      find: looks up an image's embedding by its hash.

    Raises:
      RequestError: the request as a whole cannot be answered.
    """
    target = request.target if isinstance(request, reward_pb2.ScoreRequest) else None
    _check_counts(request, target)
    embedding, pixels = _picture(request.image, find)
    height, width = (embedding.height, embedding.width) if embedding is not None else pixels.shape[:2]  # type: ignore[union-attr]
    wanted = isinstance(request, reward_pb2.SegmentRequest) or request.return_masks
    _check_mask_pixels(request, target, wanted, height, width)
    frame = _Frame(request.frame, height, width)
    candidates, statuses = frame.candidates(request.candidates)
    compared = None if target is None else _target(target, frame, height, width)
    ignored = _ignored(request, height, width)
    return Job(request.image.sha256, pixels, embedding, candidates, compared, wanted, ignored), statuses


def _check_counts(
    request: reward_pb2.ScoreRequest | reward_pb2.SegmentRequest, target: reward_pb2.Target | None
) -> None:
    if len(request.request_id) > MAX_ID_CHARACTERS:
        raise _invalid(f"request_id: {len(request.request_id)} characters, expected at most {MAX_ID_CHARACTERS}")
    if len(request.candidates) > MAX_CANDIDATES:
        raise _invalid(f"candidates: {len(request.candidates)}, expected at most {MAX_CANDIDATES}")
    if (objects := _objects(request.candidates, target)) > MAX_REQUEST_OBJECTS:
        raise _invalid(f"candidates and target: {objects} objects, expected at most {MAX_REQUEST_OBJECTS}")
    if request.frame.width <= 0 or request.frame.height <= 0:
        raise _invalid(f"frame: {request.frame.width} x {request.frame.height}, expected a positive width and height")


def _check_mask_pixels(
    request: reward_pb2.ScoreRequest | reward_pb2.SegmentRequest,
    target: reward_pb2.Target | None,
    wanted: bool,
    height: int,
    width: int,
) -> None:
    masks = max(_objects(request.candidates, target), len(request.candidates) if wanted else 0)
    if masks * height * width > MAX_MASK_PIXELS:
        each = MAX_MASK_PIXELS // (height * width)
        raise _invalid(f"masks: {masks} of {width} x {height} pixels, expected at most {each} of this size")


def _objects(candidates: Sequence[reward_pb2.Candidate], target: reward_pb2.Target | None) -> int:
    own = 0 if target is None else len(target.objects.objects)
    return own + sum(len(candidate.objects) for candidate in candidates)


def _picture(
    image: reward_pb2.Image, find: Callable[[bytes], Embedding | None]
) -> tuple[Embedding | None, np.ndarray | None]:
    """The image's embedding if it is cached, else its pixels."""
    if len(image.sha256) != hashlib.sha256().digest_size:
        raise _invalid(f"image.sha256: {len(image.sha256)} bytes, expected 32")
    if len(image.data) > MAX_IMAGE_BYTES:
        raise _invalid(f"image: {len(image.data)} bytes, expected at most {MAX_IMAGE_BYTES}")
    if image.data and hashlib.sha256(image.data).digest() != image.sha256:
        raise _invalid(f"image: its {len(image.data)} bytes do not have the stated SHA-256")
    embedding = find(image.sha256)
    if embedding is not None:
        return embedding, None
    if image.sha256 == hashlib.sha256().digest():
        raise _invalid("image: 0 bytes, expected a JPEG, PNG or WebP")
    if not image.data:
        reason = "image: not cached, send it again with its bytes"
        raise RequestError(grpc.StatusCode.FAILED_PRECONDITION, reason)
    try:
        return None, decode_image(image.data)
    except CodecError as error:
        raise _invalid(str(error)) from None


def _target(target: reward_pb2.Target, frame: "_Frame", height: int, width: int) -> np.ndarray | tuple[Prompt, ...]:
    """The target mask, bool [height, width], or the prompts from which it is made."""
    try:
        if target.WhichOneof("kind") == "mask":
            return decode_mask(target.mask, height, width)
        if target.WhichOneof("kind") == "objects":
            return frame.prompts(target.objects)
    except CodecError as error:
        raise _invalid(f"target: {error}") from None
    except RequestError as error:
        raise _invalid(f"target: {error.reason}") from None
    raise _invalid("target: missing, expected a mask or objects")


def _ignored(
    request: reward_pb2.ScoreRequest | reward_pb2.SegmentRequest, height: int, width: int
) -> np.ndarray | None:
    """The ignored pixels, bool [height, width]; None if there are none."""
    if not isinstance(request, reward_pb2.ScoreRequest) or not request.HasField("ignore"):
        return None
    try:
        return decode_mask(request.ignore, height, width)
    except CodecError as error:
        raise _invalid(f"ignore: {error}") from None


class _Frame:
    """Converts coordinates from the request's frame to pixels of the image."""

    def __init__(self, frame: reward_pb2.Frame, height: int, width: int) -> None:
        self._frame = frame
        self._scale = (width / frame.width, height / frame.height)

    def candidates(
        self, candidates: Sequence[reward_pb2.Candidate]
    ) -> tuple[list[tuple[Prompt, ...]], list[reward_pb2.Status]]:
        prompts: list[tuple[Prompt, ...]] = []
        statuses = []
        for candidate in candidates:
            try:
                prompts.append(self.prompts(candidate))
                statuses.append(status())
            except RequestError as error:
                prompts.append(())
                statuses.append(status(error.code, error.reason))
        return prompts, statuses

    def prompts(self, candidate: reward_pb2.Candidate) -> tuple[Prompt, ...]:
        """A candidate's prompts in pixels of the image. Raises RequestError if they are invalid."""
        if len(candidate.objects) > MAX_OBJECTS:
            raise _invalid(f"{len(candidate.objects)} objects, expected at most {MAX_OBJECTS}")
        return tuple(self._prompt(item, f"objects[{i}]") for i, item in enumerate(candidate.objects))

    def _prompt(self, item: reward_pb2.ObjectPrompt, name: str) -> Prompt:
        if not item.HasField("box"):
            raise _invalid(f"{name}: has no box")
        if len(item.points) > MAX_POINTS:
            raise _invalid(f"{name}: {len(item.points)} points, expected at most {MAX_POINTS}")
        corners = [(item.box.x1, item.box.y1), (item.box.x2, item.box.y2)]
        points = [(point.x, point.y) for point in item.points]
        for value in (v for spot in (*corners, *points) for v in spot):
            if not math.isfinite(value):
                raise _invalid(f"{name}: coordinate {value}, expected a finite number")
            if abs(value) > _FARTHEST:
                span = f"between -{_FARTHEST:g} and {_FARTHEST:g}"
                raise RequestError(_OUT_OF_RANGE, f"{name}: coordinate {value:g}, expected a number {span}")
        self._check_inside(corners, points, name)
        across, down = self._scale
        (x1, y1), (x2, y2), *scaled = [(x * across, y * down) for x, y in (*corners, *points)]
        return Prompt((x1, y1, x2, y2), tuple(scaled))

    def _check_inside(
        self, corners: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]], name: str
    ) -> None:
        """Checks that points are inside the image and the box touches it; a policy's boxes may extend beyond it."""
        (left, right), (top, bottom) = (sorted(values) for values in zip(*corners, strict=True))
        size = f"{self._frame.width} x {self._frame.height}"
        if right < 0 or bottom < 0 or left > self._frame.width or top > self._frame.height:
            box = ", ".join(f"{v:g}" for v in (left, top, right, bottom))
            raise RequestError(_OUT_OF_RANGE, f"{name}: box ({box}) lies outside the frame of {size}")
        for x, y in points:
            if not (0 <= x <= self._frame.width and 0 <= y <= self._frame.height):
                raise RequestError(_OUT_OF_RANGE, f"{name}: point ({x:g}, {y:g}) lies outside the frame of {size}")


def _invalid(reason: str) -> RequestError:
    return RequestError(_INVALID, reason)
