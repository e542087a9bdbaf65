"""One question about one image, with its full answer: reasoning, objects in the image's own pixels, mask, drawing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from segzero_jax.asking import Loaded, respond
from segzero_jax.evaluation import mask_row, object_rows
from segzero_jax.frames import rescale_object
from segzero_jax.overlay import Marks, decode_mask, draw
from segzero_jax.patches import decode_image
from segzero_jax.prompt import Answer, parse_answer
from segzero_jax.segmenting import Found, Segmenter, encode_mask
from segzero_jax.types import Example, Frame, ObjectPrompt

_CLOSING = "</think>"


@dataclass(frozen=True)
class Picture:
    """An image as stored, and as the policy and SAM 2 see it: upright, RGB."""

    name: str
    stored: bytes
    upright: Image.Image

    @classmethod
    def read(cls, data: bytes, name: str) -> "Picture":
        """Decodes an image. Raises ImageError, which names it, if it is not a PNG, JPEG or WebP."""
        return cls(name, data, decode_image(data, name))

    @property
    def frame(self) -> Frame:
        """The size of the upright image."""
        return Frame(*self.upright.size)


@dataclass(frozen=True)
class Answered:
    """An answer.

    Attributes:
      said: the parsed response, in the frame that the policy sees, ``side`` pixels squared.
      finished: whether the response ended by itself rather than at the token limit.
      objects: the objects in pixels of the image.
      found: SAM 2's result; ``mask`` is its mask as bool ``[height, width]``.
    """

    picture: Picture
    question: str
    text: str
    said: Answer
    finished: bool
    side: int
    objects: tuple[ObjectPrompt, ...]
    found: Found
    mask: np.ndarray | None

    def row(self) -> dict[str, Any]:
        """The answer as JSON."""
        frame, seen = self.picture.frame, self.found.seen
        return {
            "image": self.picture.name,
            "question": self.question,
            "text": self.text,
            "thinking": self.said.thinking,
            "readable": self.said.readable,
            "objects": object_rows(self.objects),
            "frame": [frame.width, frame.height],
            "answer_frame": [self.side, self.side],
            "sam_frame": None if seen is None else [seen.width, seen.height],
            "mask": mask_row(self.found.mask),
            "model_score": self.found.model_score,
            "sam": self.found.model,
            "error": self.found.error,
        }

    def scaled(self) -> str:
        """A line for an image that SAM 2 saw at less than its own size; empty for any other."""
        frame, seen = self.picture.frame, self.found.seen
        if seen in (None, frame):
            return ""
        return (
            f"SAM 2 saw the picture at {seen.width}x{seen.height}, as its server takes none larger; "
            f"objects and mask are in pixels of its own {frame.width}x{frame.height}"
        )

    def drawn(self) -> Image.Image:
        """The image with boxes, points and mask on it."""
        points = [point for obj in self.objects for point in obj.points]
        return draw(self.picture.upright, Marks([obj.box for obj in self.objects], points, self.mask))


def answer_question(
    loaded: Loaded,
    picture: Picture,
    question: str,
    segmenter: Segmenter,
    seed: int | None = None,
    temperature: float | None = None,
    watch: Callable[[str], None] | None = None,
) -> Answered:
    """Asks the policy, then SAM 2.

    Args:
      loaded: on the ambient mesh.
      seed, temperature, watch: see ``asking.respond``.

    Raises:
      PromptTooLong: the question is too long.
      RewardServerError: see ``segmenting.segment``.
    """
    frame, side = picture.frame, loaded.config.data.image_size
    example = Example(picture.name, picture.stored, frame, question, (), None)
    text, finished = respond(loaded, example, seed, temperature, watch)
    said = parse_answer(text)
    objects = tuple(rescale_object(obj, Frame(side, side), frame) for obj in said.objects)
    # A readable answer without objects means an empty mask; an unreadable one means no mask.
    empty = said.readable and segmenter.makes_masks
    found = Found(encode_mask(np.zeros((frame.height, frame.width), bool)) if empty else None)
    if objects:
        found = segmenter(picture.name, picture.stored, picture.upright, objects)
    mask = None if found.mask is None else decode_mask(vars(found.mask))
    return Answered(picture, question, text, said, finished, side, objects, found, mask)


def reasoning_so_far(text: str) -> str:
    """The reasoning in a response that may still grow; later text only adds to it."""
    thought, closed, _ = text.partition("<think>")[2].partition(_CLOSING)
    if not closed:  # a partial closing tag is not reasoning
        ending = next(n for n in range(len(_CLOSING) - 1, -1, -1) if thought.endswith(_CLOSING[:n]))
        thought = thought[: len(thought) - ending]
    return thought.strip()
