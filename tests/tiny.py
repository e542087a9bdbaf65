"""A policy that compiles in seconds and has every part of the real one, filled with numbers without a compiler."""

import json
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from segzero_jax.mesh import TRAIN, Layout
from segzero_jax.model.dims import Dims, from_hf
from segzero_jax.model.policy import Policy
from segzero_jax.model.weights import abstract_policy, resolve
from segzero_jax.patches import patch_image
from segzero_jax.processor import EncodedPrompt, Processor
from segzero_jax.types import PromptBatch

# What differs from the toy policy. Eight heads over two key-value heads, and every size divides by 16.
CHANGES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
}
VISION_CHANGES = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}


def hf_config(**changes: Any) -> dict[str, Any]:
    """The tiny policy's config.json in the hub's form."""
    config = json.loads((resolve("toy") / "config.json").read_text()) | CHANGES | changes
    config["vision_config"] = config["vision_config"] | VISION_CHANGES | {"fullatt_block_indexes": [1]}
    return config


DIMS = from_hf(hf_config())


def random_policy(dims: Dims = DIMS, layout: Layout = TRAIN, seed: int = 0, scale: float = 0.15) -> Policy:
    """Weights on the ambient mesh, the same on every mesh; no bias is 0 and no norm is 1."""
    target, mesh = abstract_policy(dims, layout), jax.sharding.get_mesh()
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = scale * rng.standard_normal(leaf.shape).astype(np.float32) + ("norm" in path[-2].name)
        return jax.device_put(values, NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree_util.tree_map_with_path(fill, target)


def load_processor() -> Processor:
    """The toy tokenizer; pictures of 56 x 56 pixels are one attention window and four tokens."""
    return Processor.load("toy", 56, "toy", 64)


def encode(processor: Processor, text: str, sizes: list[tuple[int, int]], seed: int = 0) -> EncodedPrompt:
    """A prompt with noise for pictures of these (width, height)."""
    rng = np.random.default_rng(seed)
    noise = [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    images = [patch_image(image, image.size, processor.vision) for image in noise]
    return processor.encode_parts(f"prompt {seed}", text, images)


def prompts(count: int, processor: Processor, multiple: int = 8) -> PromptBatch:
    """Prompts of different lengths: whole windows, partial windows, and every fourth without a picture."""
    sizes = [[(56, 56)], [(84, 56)], [(56, 28)], []]
    texts = ["the red one", "left", "which circle is it?"]
    rows = [encode(processor, f"{texts[i % 3]} {i}", sizes[i % 4], seed=i) for i in range(count)]
    return processor.batch(rows, multiple)
