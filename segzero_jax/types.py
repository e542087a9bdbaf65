"""The data that flows through a training step: name, dtype and shape of each field.

Shape letters, used in names and einsums everywhere:

====  =====================================================================
 b    prompts in the batch (prefix groups)
 g    responses per prompt
 p    prompt tokens, right-padded
 r    response tokens, right-padded
 i    images per prompt
 s    patch slots per image, in window order, in runs the size of a full window
 d    model width
 n, k query heads, key-value heads; q: the query heads of one key-value head
 h    head width; a: rotation angles, half as many
 f    MLP width
 v    vocabulary
 l    layers
 t    tokens or patches of a stream, prompt then responses
 u    merged units of an image, in window order; w: windows
 c    values of a patch
 z    chunks of a stream
 m    several leading axes as one: images of all prompts, tokens of a chunk
====  =====================================================================
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

Array = np.ndarray | jax.Array
Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """A pixel coordinate system: the width and height of the image that coordinates refer to."""

    width: int
    height: int


@dataclass(frozen=True)
class ObjectPrompt:
    """One object as a SAM 2 prompt: a box (x1, y1, x2, y2) and points inside it, in pixels of some Frame."""

    box: Box
    points: tuple[Point, ...]


@dataclass(frozen=True)
class RleMask:
    """A binary mask in COCO's compressed run-length encoding (``pycocotools.mask``)."""

    height: int
    width: int
    counts: str


@dataclass(frozen=True)
class Example:
    """One row of a data set. Coordinates are pixels of the stored image.

    Attributes:
      id: stable and unique within the split; every log and error names it.
      image: the encoded image (PNG, JPEG or WebP), as stored: it is sent to the reward server unchanged.
      frame: width and height of the stored image.
      question: what to look for, as worded in the data set.
      objects: the target boxes and points; empty for a question without a target.
      mask: the target mask, all zero for a question without a target; None where the data set has no masks.
      ignore: pixels excluded from every mask, in rewards and evaluations; None if there are none.
      image_id: the image's name in its source, such as "coco:391895": the same in every data set that knows its name.
      instance_id: the target of the question: questions that share it are different expressions for the same thing.
      data_set: name of the data set it is from.
    """

    id: str
    image: bytes
    frame: Frame
    question: str
    objects: tuple[ObjectPrompt, ...]
    mask: RleMask | None
    ignore: RleMask | None = None
    image_id: str = ""
    instance_id: str = ""
    data_set: str = ""


class Lengths(NamedTuple):
    """Token counts and stop reasons of sampled responses.

    Attributes:
      length_bg: int, tokens of each response, including the one that ends it.
      finished_bg: bool, whether it ended by itself rather than at ``rollout.max_response_tokens``.
    """

    length_bg: np.ndarray
    finished_bg: np.ndarray


class PromptBatch(NamedTuple):
    """Prompts ready for the policy (a pytree: numpy on the host, jax.Array on the mesh).

    Attributes:
      tokens_bp: int32 ids, right-padded.
      length_b: int32, valid tokens of each prompt.
      positions_b3p: int32 M-RoPE positions (temporal, height, width).
      next_position_b: int32, the position of the first response token on all three axes.
      image_index_bp: int32, for an image token the index of its embedding among the prompt's
        ``I * S / merge**2`` merged embeddings (window order, images one after another); -1 for text.
      patches_bisc: float32 normalised pixels, ``c = channels * temporal_patch * patch**2``.
      patch_hw_bis2: int32 row and column of each patch in its image.
      patch_valid_bis: bool, False for empty slots in runs of partial windows and for absent images.
      embedded_bud: the images' merged embeddings if they are computed already, ``u = I * S / merge**2``; the patch
        arrays are then empty, with ``I`` = 0.
    """

    tokens_bp: Array
    length_b: Array
    positions_b3p: Array
    next_position_b: Array
    image_index_bp: Array
    patches_bisc: Array
    patch_hw_bis2: Array
    patch_valid_bis: Array
    embedded_bud: Array | None = None


class Rollout(NamedTuple):
    """Sampled responses.

    Attributes:
      tokens_bgr: int32 ids; the pad id beyond ``length_bg``.
      length_bg: int32, tokens up to and including the end of turn.
      logps_bgr: float32 log-probabilities under the distribution at temperature, before top-p and top-k; 0 in padding.
      finished_bg: bool, True when the response ended by itself rather than at the length limit.
    """

    tokens_bgr: Array
    length_bg: Array
    logps_bgr: Array
    finished_bg: Array
