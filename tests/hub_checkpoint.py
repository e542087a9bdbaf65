"""Checkpoints in the layout of Qwen2.5-VL's on the hub: key names, flat config.json, several files and an index.

Values are random. Depth, vocabulary and MLP can be cut, so that what remains has real widths and fits a test. Nothing
here knows how the product reads it: names and shapes are written out from the released files.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from segzero_jax.hub import TOY


@dataclass(frozen=True)
class Size:
    """What distinguishes one released checkpoint from another; the vision tower's own widths are common to all."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool
    depth: int = 32
    vision_mlp: int = 3420
    full_attention: tuple[int, ...] = (7, 15, 23, 31)

    def cut(self, **changes: Any) -> "Size":
        """The same with, say, fewer layers; at a depth below 8 the last vision block is the one with full attention."""
        if changes.get("depth", 8) < 8:
            changes.setdefault("full_attention", (changes["depth"] - 1,))
        return replace(self, **changes)


SIZES = {
    "3B": Size(hidden=2048, layers=36, heads=16, kv_heads=2, mlp=11008, vocab=151936, tied=True),
    "7B": Size(hidden=3584, layers=28, heads=28, kv_heads=4, mlp=18944, vocab=152064, tied=False),
}
VISION = 1280


def hub_config(size: Size, special: int = 151643, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json as on the hub; ``special`` is the id of the first special token, ``<|endoftext|>``."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": special,
        "eos_token_id": special + 2,
        "vision_start_token_id": special + 9,
        "vision_end_token_id": special + 10,
        "vision_token_id": special + 11,
        "image_token_id": special + 12,
        "video_token_id": special + 13,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.mlp,
        "max_position_embeddings": 128000,
        "max_window_layers": size.layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "tie_word_embeddings": size.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": size.vocab,
        "vision_config": {
            "depth": size.depth,
            "hidden_act": "silu",
            "hidden_size": VISION,
            "intermediate_size": size.vision_mlp,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": size.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": list(size.full_attention),
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def hub_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by its hub key."""
    d, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (VISION, 3, 2, 14, 14)}
    for i in range(size.depth):
        block = f"visual.blocks.{i}."
        shapes |= {f"{block}norm1.weight": (VISION,), f"{block}norm2.weight": (VISION,)}
        shapes |= _linear(f"{block}attn.qkv", 3 * VISION, VISION) | _linear(f"{block}attn.proj", VISION, VISION)
        for name in ("gate_proj", "up_proj"):
            shapes |= _linear(f"{block}mlp.{name}", size.vision_mlp, VISION)
        shapes |= _linear(f"{block}mlp.down_proj", VISION, size.vision_mlp)
    shapes |= {"visual.merger.ln_q.weight": (VISION,)} | _linear("visual.merger.mlp.0", 4 * VISION, 4 * VISION)
    shapes |= _linear("visual.merger.mlp.2", d, 4 * VISION) | {"model.embed_tokens.weight": (size.vocab, d)}
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (d,), f"{layer}post_attention_layernorm.weight": (d,)}
        for name, width in (("q_proj", d), ("k_proj", kv), ("v_proj", kv)):
            shapes |= _linear(f"{layer}self_attn.{name}", width, d)
        shapes[f"{layer}self_attn.o_proj.weight"] = (d, d)
        shapes |= {f"{layer}mlp.{name}.weight": (size.mlp, d) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}mlp.down_proj.weight"] = (d, size.mlp)
    shapes["model.norm.weight"] = (d,)
    return shapes if size.tied else shapes | {"lm_head.weight": (size.vocab, d)}


def _linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def write_hub_checkpoint(
    directory: Path,
    size: Size,
    *,
    max_file_bytes: int,
    special: int = 490,
    dtype: Any = ml_dtypes.bfloat16,
    seed: int = 0,
) -> Path:
    """Writes such a checkpoint beside the toy tokenizer, whose first special token is 490.

    Matrices are drawn so that a row's product with unit numbers is about 1: what a token sees decides what it says.
    """
    dtype = np.dtype(dtype)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (directory / name).write_bytes((TOY / name).read_bytes())
    (directory / "config.json").write_text(json.dumps(hub_config(size, special, dtype.name), indent=2))
    rng = np.random.default_rng(seed)
    files = list(_split(hub_shapes(size), max_file_bytes // dtype.itemsize))
    weight_map = {}
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {key: _draw(key, shape, rng).astype(dtype) for key, shape in shapes.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    total = dtype.itemsize * sum(math.prod(shape) for shapes in files for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _split(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if part and sum(map(math.prod, part.values())) + math.prod(shape) > limit:
            yield part
            part = {}
        part[key] = shape
    yield part


def _draw(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:  # no bias is 0 and no norm is 1
        return np.float32(0.1) * values + np.float32("norm" in key or "ln_q" in key)
    return values * np.float32(1 if "embed_tokens" in key else math.prod(shape[1:]) ** -0.5)
