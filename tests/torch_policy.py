"""Random checkpoints made by transformers, and its forward pass on our prompts."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from segzero_jax.model.weights import resolve
from segzero_jax.processor import EncodedPrompt, Processor


def make_checkpoint(directory: Path, config: dict[str, Any], scale: float, seed: int = 0) -> Path:
    """A checkpoint in the hub's file form beside the toy tokenizer: biases and norms not at their defaults.

    Matrices are ``scale`` times as large as a fresh model's, so that what a token sees decides what it says.
    """
    source = resolve("toy")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(source / name, directory / name)
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(directory)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(scale)
    model.save_pretrained(directory / "saved")
    for file in (directory / "saved").glob("*.safetensors"):
        shutil.move(file, directory / file.name)
    return directory


def load_torch(directory: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def torch_inputs(prompt: EncodedPrompt, processor: Processor, tail: Sequence[int] = ()) -> dict[str, torch.Tensor]:
    """What transformers' model takes for one prompt, followed by the ids in ``tail``."""
    ids = torch.tensor([*prompt.tokens_p.tolist(), *map(int, tail)])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(_raster_patches(prompt, processor)))
        inputs["image_grid_thw"] = torch.tensor([[1, *image.grid] for image in prompt.images])
        inputs["mm_token_type_ids"] = (ids == processor.image_id).int()
    return inputs


def _raster_patches(prompt: EncodedPrompt, processor: Processor) -> list[np.ndarray]:
    """The patches as the Hugging Face processor orders them: raster order of merged units."""
    merge2 = processor.vision.merge**2
    ordered = []
    for image in prompt.images:
        units = image.patches_sc.reshape(-1, merge2, image.patches_sc.shape[1])
        ordered.append(units[image.unit_k].reshape(-1, image.patches_sc.shape[1]))
    return ordered
