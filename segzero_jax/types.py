"""What flows through a training step, field by field: name, dtype, shape.

Shape letters, used in names and einsums everywhere:

====  =====================================================================
 b    prompts in the batch (prefix groups)
 g    responses per prompt
 p    prompt tokens, right-padded
 r    response tokens, right-padded
 i    images per prompt
 s    patch slots per image, in window order, in runs as large as a whole window
 d    model width
 n, k query heads, key-value heads; q: the query heads of one key-value head
 h    head width; a: rotation angles, half as many
 f    MLP width
 v    vocabulary
 l    layers
 t    tokens or patches of a stream, prompt then responses
 u    merged units of an image, in window order; w: windows
 c    numbers of a patch
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
    """A pixel coordinate system: the width and height of the picture that coordinates refer to."""

    width: int
    height: int


@dataclass(frozen=True)
class ObjectPrompt:
    """One object as SAM 2 is asked for it: a box (x1, y1, x2, y2) and points inside it, in pixels of some Frame."""

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
      image: the encoded picture (PNG, JPEG or WebP), as stored: it travels to the reward server unchanged.
      frame: width and height of the stored picture.
      question: what to look for, as the data set has it.
      objects: the target boxes and points; empty for a question without a target.
      mask: the target mask, all zero for a question without a target; None where the data set has no masks.
      ignore: pixels that count in no mask, of a reward or an evaluation; None for none.
      image_id: the picture in the names of its source, such as "coco:391895": the same picture has the same one in
        every data set that knows it by name.
      instance_id: what is asked for: questions with the same one are different expressions for the same thing.
      data_set: the name of the one that it is from.
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
      length_bg: int, how many tokens each has, the one that ends it included.
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
      patch_valid_bis: bool, False for the slots that fill up runs of partial windows and absent images.
      embedded_bud: the images' merged embeddings where they are computed already, ``u = I * S / merge**2``; there
        are no patches then, ``I`` is 0 in their arrays.
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
      tokens_bgr: int32 ids; past ``length_bg`` the pad id.
      length_bg: int32, tokens up to and including the end of turn.
      logps_bgr: float32 log-probabilities under the distribution at temperature, before top-p and top-k; 0 in padding.
      finished_bg: bool, True when the response ended by itself rather than at the length limit.
    """

    tokens_bgr: Array
    length_bg: Array
    logps_bgr: Array
    finished_bg: Array
