"""Turns images and questions into tensors for the policy, and token ids back into text.

Same ids and positions as Hugging Face's Qwen2.5-VL processor and model (transformers 5.23: ``get_rope_index``), without
transformers: numpy and ``tokenizers`` only.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from segzero_jax.config import QUESTION
from segzero_jax.hub import model_directory
from segzero_jax.patches import PatchedImage, VisionSpec, decode_image, patch_image
from segzero_jax.prompt import question_text
from segzero_jax.types import Example, PromptBatch

# The chat layout of Qwen2.5-VL with its default system turn; images come before the text of the user turn.
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_VISUAL = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class PromptTooLong(ValueError):
    """A prompt over the limit; the message names it, its length and the limit."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, not yet padded.

    Attributes:
      id: the example's id.
      tokens_p: int32 token ids.
      positions_3p: int32 M-RoPE positions.
      next_position: position of the first response token, on all three axes.
      images: the images in prompt order.
    """

    id: str
    tokens_p: np.ndarray
    positions_3p: np.ndarray
    next_position: int
    images: tuple[PatchedImage, ...]


def mrope_positions(tokens: np.ndarray, image_id: int, grids: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """M-RoPE positions, int32 [3, P], and the next position; transformers' ``get_rope_index`` for still images.

    Text counts up on all axes. An image of ``grids`` (rows and columns of merged units) stays at one time and spreads
    over rows and columns; text continues after the larger of the two.
    """
    positions = np.zeros((3, len(tokens)), np.int32)
    at, position = 0, 0
    starts = np.flatnonzero(np.diff(tokens == image_id, prepend=False))[::2].tolist()
    if len(starts) != len(grids):
        raise ValueError(f"{len(starts)} runs of image tokens, expected one for each of {len(grids)} images")
    for start, (rows, columns) in zip(starts, grids, strict=True):
        positions[:, at:start] = position + np.arange(start - at)
        position += start - at
        at = start + rows * columns
        positions[:, start:at] = position
        positions[1:, start:at] += np.indices((rows, columns)).reshape(2, -1)
        position += max(rows, columns)
    positions[:, at:] = position + np.arange(len(tokens) - at)
    return positions, position + len(tokens) - at


class Processor:
    """A checkpoint's tokenizer and image settings, applied to examples.

    Attributes:
      image_size: images are squashed to a square of this many pixels a side.
      resampling: Pillow's filter for that.
      max_prompt_tokens: longer prompts are rejected.
      vision: how images are cut into patches.
      pad_id: right padding of prompts and responses.
      end_ids: tokens that end a response.
      image_id: the token for one merged unit of an image.
      visual_ids: tokens that only occur in prompts.
    """

    def __init__(
        self,
        tokenizer: bytes,
        vision: VisionSpec,
        image_size: int,
        wording: str,
        max_prompt_tokens: int,
        resampling: Image.Resampling,
    ) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer)
        # A question that spells out a special token is text, not that token.
        self._literal = Tokenizer.from_buffer(tokenizer)
        self._literal.encode_special_tokens = True
        for each in (self._tokenizer, self._literal):
            # A file may hold the settings of the last call before it was saved; transformers resets both on every call.
            each.no_truncation()
            each.no_padding()
        self._wording = wording
        self.vision = vision
        self.image_size = image_size
        self.resampling = resampling
        self.max_prompt_tokens = max_prompt_tokens
        self.pad_id = self._id("<|endoftext|>")
        self.end_ids = (self._id("<|im_end|>"), self.pad_id)
        self.image_id = self._id("<|image_pad|>")
        self.visual_ids = tuple(self._id(token) for token in _VISUAL)

    @classmethod
    def load(
        cls, path: str | Path, image_size: int, wording: str, max_prompt_tokens: int, resampling: str = "bicubic"
    ) -> "Processor":
        """Reads a checkpoint's tokenizer.json, config.json and preprocessor_config.json (or processor_config.json).

        ``hub.model_directory`` documents ``path``.

        Raises:
          FileNotFoundError: the directory or one of the files is missing.
          ValueError: the files are inconsistent, or ``image_size`` is not a whole number of merged units.
        """
        directory = settings_directory(path)
        vision = _read_vision(directory)
        if image_size % (vision.patch * vision.merge):
            raise ValueError(
                f"image_size={image_size}: expected a multiple of {vision.patch * vision.merge} ({directory})"
            )
        tokenizer, how = _read(directory, "tokenizer.json"), Image.Resampling[resampling.upper()]
        return cls(tokenizer, vision, image_size, wording, max_prompt_tokens, how)

    def encode(self, example: Example) -> EncodedPrompt:
        """One example: its image squashed to ``image_size`` squared, its question in the configured wording.

        Raises:
          ImageError: the image cannot be read.
          PromptTooLong: the prompt, image tokens included, is over ``max_prompt_tokens``. Nothing is ever truncated.
        """
        image = decode_image(example.image, example.id)
        patched = patch_image(image, (self.image_size, self.image_size), self.vision, self.resampling)
        return self.encode_parts(example.id, question_text(self._wording, example.question), [patched])

    def count_tokens(self, questions: Sequence[str]) -> np.ndarray:
        """Prompt token counts, int32 [N], that ``encode`` would give for questions about one image each.

        No image is needed: all are squashed to the same size.
        """
        units = (self.image_size // (self.vision.patch * self.vision.merge)) ** 2
        around = (
            self._tokenizer.encode(_BEFORE + "<|vision_start|><|vision_end|>").ids,
            self._tokenizer.encode(_AFTER).ids,
        )
        texts = [question_text(self._wording, question) for question in questions]
        counts = [len(encoding.ids) for encoding in self._literal.encode_batch(texts)]
        return np.array(counts, np.int32) + len(around[0]) + len(around[1]) + units

    @property
    def text_identity(self) -> str:
        """A digest of everything that ``count_tokens`` depends on."""
        around = f"{_BEFORE} {question_text(self._wording, QUESTION)} {_AFTER}"
        told = f"{self._tokenizer.to_str()} {around} {self.image_size} {self.vision.patch} {self.vision.merge}"
        return hashlib.sha256(told.encode()).hexdigest()

    def encode_parts(self, name: str, text: str, images: Sequence[PatchedImage]) -> EncodedPrompt:
        """A user turn of any images, in order, and then a literal text. Raises PromptTooLong."""
        grids = [(image.grid[0] // self.vision.merge, image.grid[1] // self.vision.merge) for image in images]
        pads = "".join(f"<|vision_start|>{'<|image_pad|>' * (rows * cols)}<|vision_end|>" for rows, cols in grids)
        ids = (
            self._tokenizer.encode(_BEFORE + pads).ids
            + self._literal.encode(text).ids
            + self._tokenizer.encode(_AFTER).ids
        )
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLong(
                f"{name}: prompt of {len(ids)} tokens ({sum(r * c for r, c in grids)} of them image), "
                f"expected at most max_prompt_tokens={self.max_prompt_tokens}"
            )
        tokens = np.array(ids, np.int32)
        positions, following = mrope_positions(tokens, self.image_id, grids)
        return EncodedPrompt(name, tokens, positions, following, tuple(images))

    def batch(self, prompts: Sequence[EncodedPrompt], multiple: int | None = None) -> PromptBatch:
        """Stacks prompts, right-padded to a multiple of ``multiple``, by default ``max_prompt_tokens``.

        Every image gets as many slots as the largest one, every prompt as many images as the one with most; absent
        slots and images are marked invalid.
        """
        multiple = multiple or self.max_prompt_tokens
        b, merge2 = len(prompts), self.vision.merge**2
        p = -(-max(len(prompt.tokens_p) for prompt in prompts) // multiple) * multiple
        i = max(len(prompt.images) for prompt in prompts)
        s = max((len(image.valid_s) for prompt in prompts for image in prompt.images), default=0)
        batch = PromptBatch(
            tokens_bp=np.full((b, p), self.pad_id, np.int32),
            length_b=np.array([len(prompt.tokens_p) for prompt in prompts], np.int32),
            positions_b3p=np.zeros((b, 3, p), np.int32),
            next_position_b=np.array([prompt.next_position for prompt in prompts], np.int32),
            image_index_bp=np.full((b, p), -1, np.int32),
            patches_bisc=np.zeros((b, i, s, self.vision.patch_width), np.float32),
            patch_hw_bis2=np.zeros((b, i, s, 2), np.int32),
            patch_valid_bis=np.zeros((b, i, s), bool),
        )
        for row, prompt in enumerate(prompts):
            length = len(prompt.tokens_p)
            batch.tokens_bp[row, :length] = prompt.tokens_p
            batch.positions_b3p[row, :, :length] = prompt.positions_3p
            units = [n * (s // merge2) + image.unit_k for n, image in enumerate(prompt.images)]
            if units:
                batch.image_index_bp[row, :length][prompt.tokens_p == self.image_id] = np.concatenate(units)
            for n, image in enumerate(prompt.images):
                slots = len(image.valid_s)
                batch.patches_bisc[row, n, :slots] = image.patches_sc
                batch.patch_hw_bis2[row, n, :slots] = image.patch_hw_s2
                batch.patch_valid_bis[row, n, :slots] = image.valid_s
        return batch

    def widen(self, batch: PromptBatch, length: int) -> PromptBatch:
        """A batch on the host with prompts padded to ``length``, that of a longer batch elsewhere."""
        more = length - batch.tokens_bp.shape[1]
        if not more:
            return batch
        return batch._replace(
            tokens_bp=np.pad(batch.tokens_bp, ((0, 0), (0, more)), constant_values=self.pad_id),
            positions_b3p=np.pad(batch.positions_b3p, ((0, 0), (0, 0), (0, more))),
            image_index_bp=np.pad(batch.image_index_bp, ((0, 0), (0, more)), constant_values=-1),
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text as it is; special tokens in it are recognised."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"tokenizer.json: no {token}, expected a Qwen2.5-VL tokenizer")
        return found


def settings_directory(path: str | Path) -> Path:
    """The directory of a ``model.path``, not necessarily with weights. Raises FileNotFoundError, HubError."""
    directory = model_directory(path, weights=False)
    if not directory.is_dir():
        raise FileNotFoundError(f'{path}: no such directory, expected "toy" or a Hugging Face checkpoint directory')
    return directory


def _read(directory: Path, name: str) -> bytes:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected in a Hugging Face checkpoint directory")
    return path.read_bytes()


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_read(directory, name))
    except ValueError as error:  # Also bytes that are not text.
        raise ValueError(f"{directory / name}: not JSON: {error}") from None
    return _object(value, directory / name)


def _object(value: Any, where: Path | str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {json.dumps(value)[:80]}")
    return value


def _by_channel(settings: dict[str, Any], key: str, directory: Path, above: float = -math.inf) -> Any:
    values: Any = settings.get(key)
    usable = isinstance(values, list) and [type(v) in (int, float) and above < v < math.inf for v in values]
    if usable != [True] * 3:
        limit = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"{directory}: picture settings have {key} {values!r}: expected three numbers{limit}")
    return tuple(values)


def _read_vision(directory: Path) -> VisionSpec:
    """Reads config.json, whose flat hub form and nested transformers 5 form agree here, and the image settings.

    The latter are in preprocessor_config.json on the hub; transformers 5 writes processor_config.json instead.
    """
    model = _read_json(directory, "config.json").get("vision_config", {})
    newer = directory / "processor_config.json"
    if newer.is_file() and not (directory / "preprocessor_config.json").is_file():
        images = _object(_read_json(directory, newer.name).get("image_processor", {}), f"{newer}: image_processor")
    else:
        images = _read_json(directory, "preprocessor_config.json")
    patch, merge = model.get("patch_size", 14), model.get("spatial_merge_size", 2)
    if (images.get("patch_size", patch), images.get("merge_size", merge)) != (patch, merge):
        raise ValueError(
            f"{directory}: preprocessor_config.json has patch_size={images.get('patch_size')} and "
            f"merge_size={images.get('merge_size')}, config.json has {patch} and {merge}"
        )
    return VisionSpec(
        patch=patch,
        temporal_patch=model.get("temporal_patch_size", 2),
        merge=merge,
        window_side=model.get("window_size", 112) // (patch * merge) * merge,
        mean=_by_channel(images, "image_mean", directory),
        std=_by_channel(images, "image_std", directory, above=0),
    )
