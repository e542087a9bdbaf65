"""One prompt group at Seg-Zero's shapes, for measuring beside PyTorch: a checkpoint that both sides load, and one question.

The policy is a Qwen2.5-VL of 46 M parameters in float32, written by transformers with random weights; the reference is
another of the same dimensions. The picture has 840 x 840 pixels (900 of the prompt's tokens). Each side runs in a process
of its own (``benchmarks/jax_side.py``, ``benchmarks/torch_side.py``) which does one thing at a time, when it is told to.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

IMAGE = 840
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_SPECIAL = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
FIRST_TEXT_ID = 10
_TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True,
}
_VISION = {
    "depth": 8,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_heads": 6,
    "out_hidden_size": 512,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [3, 7],
    "in_channels": 3,
}


@dataclass(frozen=True)
class Shape:
    """Tokens of the prompt and of each response, and responses of the group."""

    prompt: int = 1150
    response: int = 150
    group: int = 8


def write(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Writes ``policy/``, ``reference/`` and ``group.npz`` for both sides."""
    # The sides import only their own framework; whoever writes needs transformers.
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **_IDS, **_SPECIAL}
    for number, name in enumerate(("policy", "reference")):
        where = directory / name
        where.mkdir(parents=True)
        (where / "config.json").write_text(json.dumps(config | _TEXT | {"vision_config": _VISION}))
        torch.manual_seed(seed + number)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(where)).float()
        model.save_pretrained(where)
        (where / "config.json").write_text(json.dumps(config | _TEXT | {"vision_config": _VISION}))
    rng = np.random.default_rng(seed)
    units = (IMAGE // 28) ** 2
    text = lambda n: rng.integers(FIRST_TEXT_ID, _TEXT["vocab_size"], n)  # noqa: E731
    before, after = 20, shape.prompt - 20 - units - 2
    if after < 1:
        raise ValueError(f"prompt of {shape.prompt} tokens: expected at least {units + 23}, the picture has {units}")
    start, end, image = (_SPECIAL[f"{name}_token_id"] for name in ("vision_start", "vision_end", "image"))
    np.savez(
        directory / "group.npz",
        prompt=np.concatenate([text(before), [start], np.full(units, image), [end], text(after)]).astype(np.int32),
        responses=text((shape.group, shape.response)).astype(np.int32),
        advantages=rng.standard_normal(shape.group).astype(np.float32),
        picture=rng.integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8),
        image_id=image,
    )
