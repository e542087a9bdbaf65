"""What the tests of the reward server share: toy scenes as requests, a server in this process, the plain predictor."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc
import numpy as np
import torch
from PIL import Image

from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.codec import encode_mask
from reward_server.segmenter import Prompt, Segmenter
from reward_server.server import RewardServer, Settings
from segzero_jax.data.scenes import Scene, make_example_scene

# Batching changes the order of float32 sums: a pixel whose logit is nearly zero may fall on the other side.
PIXELS_APART = 5
SCORE_APART = 1e-4


@contextmanager
def serving(
    settings: Settings | None = None, segmenters: Sequence[Segmenter] | None = None
) -> Iterator[tuple[RewardServer, reward_pb2_grpc.RewardServiceStub]]:
    """A server in this process with the toy model, or these, and a way to call it in plain text."""
    torch.set_num_threads(1)
    segmenters = segmenters or [Segmenter.load("toy", "cpu")]
    server = RewardServer(settings, len(segmenters))
    try:
        server.serve(segmenters)
        with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", 2**25)]) as channel:
            yield server, reward_pb2_grpc.RewardServiceStub(channel)
    finally:
        server.stop()


def scene(index: int = 0) -> Scene:
    return make_example_scene("val", index)[0]


def scene_with(objects: int) -> Scene:
    """A scene with so many objects at least."""
    return next(scene(i) for i in range(20) if len(scene(i).objects) >= objects)


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
    """Every object's box, moved, and points inside the object."""
    made = []
    for item in scene.objects:
        box = tuple(float(v) + shift for v in item.box)
        spots = (item.point, (item.point[0] + 3, item.point[1] + 2))[:points]
        made.append(Prompt(box, tuple((float(x), float(y)) for x, y in spots)))
    return made


def request_for(
    scene: Scene, *candidates: reward_pb2.Candidate, request_id: str = "a request"
) -> reward_pb2.ScoreRequest:
    """Asks for scores against the scene's first object."""
    height, width = scene.image.shape[:2]
    return reward_pb2.ScoreRequest(
        request_id=request_id,
        image=image_message(encoded(scene.image)),
        frame=reward_pb2.Frame(width=width, height=height),
        target=reward_pb2.Target(mask=encode_mask(scene.objects[0].mask)),
        candidates=candidates,
    )


def group_request(index: int, size: int = 8, request_id: str = "a group") -> reward_pb2.ScoreRequest:
    """A group as a trainer sends it: so many answers to one scene, each a little off in its own way."""
    picture = scene(index)
    draws = np.random.default_rng([index, size])
    prompts = prompts_of(picture)
    shifted = []
    for i in range(size):
        prompt = prompts[i % len(prompts)]
        box = tuple(float(v) for v in np.array(prompt.box) + draws.normal(0, 4, 4))
        shifted.append(candidate(Prompt(box, prompt.points)))
    return request_for(picture, *shifted, request_id=request_id)


def plain_mask(segmenter: Segmenter, prompt: Prompt) -> tuple[np.ndarray, float]:
    """The highest-scored mask of ``SAM2ImagePredictor.predict`` for the image that is set, and its score."""
    masks, scores, _ = segmenter.predictor.predict(
        point_coords=np.array(prompt.points) if prompt.points else None,
        point_labels=np.ones(len(prompt.points)) if prompt.points else None,
        box=np.array(prompt.box),
        multimask_output=True,
    )
    # As Seg-Zero picks: of equal scores the last.
    return masks[np.argsort(scores)[::-1][0]] > 0, float(scores.max())
