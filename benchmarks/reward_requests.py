"""Requests for the reward server's benchmarks: toy scenes, each with differently jittered candidates."""

import functools
import hashlib
import io

import numpy as np
from PIL import Image

from reward_server import reward_pb2
from reward_server.codec import encode_mask
from reward_server.segmenter import Prompt
from segzero_jax.data.scenes import Scene, make_example_scene

# Number of distinct images; higher indices start over.
PICTURES = 64


def picture(index: int) -> Scene:
    """A scene (cached)."""
    return _picture(index % PICTURES)


def prompts(index: int, size: int) -> tuple[Prompt, ...]:
    """``size`` boxes with a point each, around the scene's objects in turn."""
    return _prompts(index % PICTURES, size)


def group_request(index: int, size: int) -> reward_pb2.ScoreRequest:
    """A request for the scores of those prompts, each a candidate, against the scene's first object (cached)."""
    return _group_request(index % PICTURES, size)


@functools.cache
def _picture(index: int) -> Scene:
    return make_example_scene("val", index)[0]


@functools.cache
def _prompts(index: int, size: int) -> tuple[Prompt, ...]:
    objects = picture(index).objects
    draws = np.random.default_rng([index, size])
    made = []
    for i in range(size):
        item = objects[i % len(objects)]
        box = tuple(float(v) for v in np.array(item.box) + draws.normal(0, 4, 4))
        made.append(Prompt(box, ((float(item.point[0]), float(item.point[1])),)))  # type: ignore[arg-type]
    return tuple(made)


@functools.cache
def _group_request(index: int, size: int) -> reward_pb2.ScoreRequest:
    scene = picture(index)
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "PNG")
    data = file.getvalue()
    height, width = scene.image.shape[:2]
    request = reward_pb2.ScoreRequest(
        request_id=str(index),
        image=reward_pb2.Image(data=data, sha256=hashlib.sha256(data).digest()),
        frame=reward_pb2.Frame(width=width, height=height),
        target=reward_pb2.Target(mask=encode_mask(scene.objects[0].mask)),
    )
    for prompt in prompts(index, size):
        x1, y1, x2, y2 = prompt.box
        points = [reward_pb2.Point(x=x, y=y) for x, y in prompt.points]
        request.candidates.add().objects.add(box=reward_pb2.Box(x1=x1, y1=y1, x2=x2, y2=y2), points=points)
    return request
