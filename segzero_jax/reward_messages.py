"""Data exchanged between trainer and reward server, as the trainer's own types and as the messages of reward.proto."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reward_server import reward_pb2
from segzero_jax.types import Frame, ObjectPrompt, RleMask

# google.rpc.Code, as in reward.proto's Status.
_OUT_OF_RANGE = 11
# As in reward.proto: a request with a longer id is rejected.
_MOST_ID_CHARACTERS = 256
_KEPT_ID_CHARACTERS = 200


@dataclass(frozen=True)
class ServerInfo:
    """A server's description of itself: see GetInfoResponse in reward.proto."""

    address: str
    api_version: int
    server_version: str
    model: str
    checkpoint_sha256: str
    dtype: str
    device: str
    libraries: dict[str, str]
    max_image_bytes: int
    max_image_pixels: int
    max_candidates: int
    max_objects: int
    max_mask_pixels: int

    def takes(self, candidates: int, objects: int, masks: int, pixels: int) -> bool:
        """Whether one request may have this many candidates, objects and masks, each mask of this many pixels."""
        found = ((candidates, self.max_candidates), (objects, self.max_objects), (masks * pixels, self.max_mask_pixels))
        return all(count <= most or not most for count, most in found)


@dataclass(frozen=True)
class ScoreRequest:
    """One image and the responses to one question about it.

    Attributes:
      id: returned with the answer and written to the server's log, where a long one is truncated.
      image: the encoded image, as stored.
      frame: the frame of all coordinates here; usually the stored image's size.
      target: the mask to compare with, of the stored image's size, or objects whose mask SAM 2 makes.
      candidates: the objects of each response; its mask is the union of theirs.
      ignore: pixels of the stored image that count in no mask; None if all count.
    """

    id: str
    image: bytes
    frame: Frame
    target: RleMask | tuple[ObjectPrompt, ...]
    candidates: tuple[tuple[ObjectPrompt, ...], ...]
    ignore: RleMask | None = None


@dataclass(frozen=True)
class CandidateScore:
    """The score of one response's mask.

    Attributes:
      iou: IoU with the target; 1 when both are empty. None when the service refused to score, 0 when it refused a
        prompt that is outside the image: see ``error``.
      intersection, union: pixels of the stored image, without ignored ones; for a refused answer 0 and the target's,
        if SAM 2 got that far.
      model_score: SAM 2's own estimate of the IoU, the mean over the objects; 0 without objects.
      mask: the whole mask, if requested.
      error: why SAM 2 was not asked, or did not answer; empty if it did.
    """

    iou: float | None
    intersection: int
    union: int
    model_score: float
    mask: RleMask | None
    error: str


@dataclass(frozen=True)
class Segmentation:
    """One response's mask, or None and the reason in ``error``; ``model_score`` as in CandidateScore."""

    mask: RleMask | None
    model_score: float
    error: str


def info_from(address: str, response: reward_pb2.GetInfoResponse) -> ServerInfo:
    """The ServerInfo in the response of the server at ``address``."""
    return ServerInfo(
        address=address,
        api_version=response.api_version,
        server_version=response.server_version,
        model=response.model,
        checkpoint_sha256=response.checkpoint_sha256,
        dtype=response.dtype,
        device=response.device,
        libraries=dict(response.libraries),
        max_image_bytes=response.limits.image_bytes,
        max_image_pixels=response.limits.image_pixels,
        max_candidates=response.limits.candidates,
        max_objects=response.limits.objects,
        max_mask_pixels=response.limits.mask_pixels,
    )


def split(group: ScoreRequest, masks: bool, servers: Sequence[ServerInfo]) -> list[ScoreRequest]:
    """Splits a group into as few requests as the servers' limits allow, candidates in order.

    A candidate that exceeds a limit by itself gets its own request, whose refusal affects no other answer.

    Args:
      masks: whether the candidates' masks are requested.
    """
    if isinstance(group.target, RleMask):
        own, pixels = 0, group.target.height * group.target.width
    else:
        own, pixels = len(group.target), group.frame.width * group.frame.height
    parts: list[list[tuple[ObjectPrompt, ...]]] = [[]]
    for candidate in group.candidates:
        longer = [*parts[-1], candidate]
        objects = own + sum(map(len, longer))
        made = max(objects, len(longer)) if masks else objects
        if len(longer) == 1 or all(server.takes(len(longer), objects, made, pixels) for server in servers):
            parts[-1] = longer
        else:
            parts.append([candidate])
    return [replace(group, candidates=tuple(part)) for part in parts]


def score_request(group: ScoreRequest, masks: bool) -> reward_pb2.ScoreRequest:
    """The message that requests a group's scores and, if ``masks``, its masks."""
    if isinstance(group.target, RleMask):
        target = reward_pb2.Target(mask=_rle(group.target))
    else:
        target = reward_pb2.Target(objects=_candidate(group.target))
    return reward_pb2.ScoreRequest(
        request_id=_request_id(group.id),
        image=_image(group.image),
        frame=reward_pb2.Frame(width=group.frame.width, height=group.frame.height),
        target=target,
        candidates=[_candidate(objects) for objects in group.candidates],
        return_masks=masks,
        ignore=None if group.ignore is None else _rle(group.ignore),
    )


def segment_request(
    id: str, image: bytes, frame: Frame, candidates: Sequence[tuple[ObjectPrompt, ...]]
) -> reward_pb2.SegmentRequest:
    """The message that requests only masks."""
    return reward_pb2.SegmentRequest(
        request_id=_request_id(id),
        image=_image(image),
        frame=reward_pb2.Frame(width=frame.width, height=frame.height),
        candidates=[_candidate(objects) for objects in candidates],
    )


def _request_id(id: str) -> str:
    """An id within the servers' limit, for logs and for matching answers: truncated ids differ by their hash."""
    if len(id) <= _MOST_ID_CHARACTERS:
        return id
    return f"{id[:_KEPT_ID_CHARACTERS]}-{hashlib.sha256(id.encode('utf-8', 'replace')).hexdigest()[:16]}"


def _image(data: bytes) -> reward_pb2.Image:
    return reward_pb2.Image(data=data, sha256=hashlib.sha256(data).digest())


def _rle(mask: RleMask) -> reward_pb2.Rle:
    return reward_pb2.Rle(height=mask.height, width=mask.width, counts=mask.counts)


def _candidate(objects: Sequence[ObjectPrompt]) -> reward_pb2.Candidate:
    candidate = reward_pb2.Candidate()
    for item in objects:
        x1, y1, x2, y2 = item.box
        points = [reward_pb2.Point(x=x, y=y) for x, y in item.points]
        candidate.objects.add(box=reward_pb2.Box(x1=x1, y1=y1, x2=x2, y2=y2), points=points)
    return candidate


def score_from(entry: reward_pb2.CandidateScore, target_area: int) -> CandidateScore:
    """One candidate's score. A prompt outside the image selects nothing: its score is zero, not missing.

    Args:
      target_area: the target area in the response that contains ``entry``.
    """
    if entry.status.code != 0:
        iou = 0.0 if entry.status.code == _OUT_OF_RANGE else None
        return CandidateScore(iou, 0, target_area, 0.0, None, entry.status.message)
    return CandidateScore(entry.iou, entry.intersection, entry.union, entry.model_score, _mask_from(entry), "")


def refusal(request: reward_pb2.ScoreRequest, reason: str) -> list[CandidateScore]:
    """The scores of a group that was not scored: the reason for every candidate."""
    return [CandidateScore(None, 0, 0, 0.0, None, reason)] * len(request.candidates)


def segmentation_from(entry: reward_pb2.CandidateMask) -> Segmentation:
    """One candidate's mask."""
    if entry.status.code != 0:
        return Segmentation(None, 0.0, entry.status.message)
    return Segmentation(_mask_from(entry), entry.model_score, "")


def _mask_from(entry: reward_pb2.CandidateScore | reward_pb2.CandidateMask) -> RleMask | None:
    if not entry.HasField("mask"):
        return None
    return RleMask(entry.mask.height, entry.mask.width, entry.mask.counts)
