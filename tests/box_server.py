"""A picture with one thing in it, and a server whose masks are the boxes it is asked about."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from PIL import Image

from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.codec import decode_image, encode_mask
from segzero_jax.data.scenes import Scene, make_example_scene
from segzero_jax.overlay import decode_mask
from segzero_jax.types import Frame

ROTATED = 6  # EXIF: turn clockwise by a quarter to see it upright


def simple_scene() -> tuple[Scene, str]:
    """One large object alone in a picture that is not square: what any trained toy policy finds."""
    for index in range(1000):
        scene, question = make_example_scene("val", index)
        if len(scene.objects) == 1 and scene.objects[0].mask.mean() > 0.05 and question.kind == "attribute":
            return scene, question.text
    raise AssertionError("no such scene")


SCENE, QUESTION = simple_scene()
PICTURE = Image.fromarray(SCENE.image)
FRAME = Frame(*PICTURE.size)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(kind: str, **options: Any) -> bytes:
    """The picture as a camera held sideways stores it."""
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return encoded(PICTURE.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, **options)


class BoxServer(reward_pb2_grpc.RewardServiceServicer):
    """Reads pictures and frames as the real server does; its masks are the boxes themselves."""

    def __init__(self, version: int = reward_pb2.API_VERSION_CURRENT, pixels: int = 10**6) -> None:
        self.version = version
        self.pixels = pixels
        self.seen: list[reward_pb2.SegmentRequest] = []
        self.change: Callable[[reward_pb2.SegmentResponse], None] = lambda response: None

    def GetInfo(self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext) -> reward_pb2.GetInfoResponse:
        limits = reward_pb2.Limits(image_bytes=2**20, image_pixels=self.pixels)
        return reward_pb2.GetInfoResponse(api_version=self.version, model="boxes", limits=limits)

    def Segment(self, request: reward_pb2.SegmentRequest, context: grpc.ServicerContext) -> reward_pb2.SegmentResponse:
        self.seen.append(request)
        response = reward_pb2.SegmentResponse(request_id=request.request_id)
        for candidate in request.candidates:
            response.candidates.add(mask=encode_mask(boxes_as_mask(request, candidate)), model_score=0.5)
        self.change(response)
        return response

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        try:
            decode_image(request.image.data)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        as_boxes = request.target.WhichOneof("kind") == "objects"
        target = boxes_as_mask(request, request.target.objects) if as_boxes else pixels_of(request.target.mask)
        counted = ~pixels_of(request.ignore) if request.HasField("ignore") else np.ones_like(target)
        response = reward_pb2.ScoreResponse(request_id=request.request_id, api_version=self.version)
        for candidate in request.candidates:
            mask = boxes_as_mask(request, candidate)
            inside, union = int((mask & target & counted).sum()), int(((mask | target) & counted).sum())
            score = response.candidates.add(intersection=inside, union=union, iou=inside / union if union else 1.0)
            score.model_score = 0.5
            if request.return_masks:
                score.mask.CopyFrom(encode_mask(mask))
        return response


def pixels_of(rle: reward_pb2.Rle) -> np.ndarray:
    return decode_mask({"height": rle.height, "width": rle.width, "counts": rle.counts})


def boxes_as_mask(
    request: reward_pb2.SegmentRequest | reward_pb2.ScoreRequest, candidate: reward_pb2.Candidate
) -> np.ndarray:
    """The union of a candidate's boxes as pixels of the stored picture."""
    height, width = decode_image(request.image.data).shape[:2]
    scale = width / request.frame.width, height / request.frame.height
    mask = np.zeros((height, width), bool)
    for item in candidate.objects:
        x1, y1, x2, y2 = item.box.x1, item.box.y1, item.box.x2, item.box.y2
        rows, columns = round(y1 * scale[1]), round(x1 * scale[0])
        mask[rows : round(y2 * scale[1]), columns : round(x2 * scale[0])] = True
    return mask


@contextmanager
def serving(servicer: BoxServer, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    healthy = health.HealthServicer()
    name = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
    healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
