"""The policy against transformers' Qwen2_5_VLForConditionalGeneration: same weights, same prompts, float32."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.policy import Pass, prompt_logits
from segzero_jax.processor import EncodedPrompt, Processor, checkpoint_directory, patch_image

RELATIVE = 1e-4  # of the largest logit; a contract


def make_checkpoint(directory: Path, seed: int = 0, **changes: object) -> Path:
    """A random checkpoint in the hub's file form: the toy configuration, biases and norms not at their defaults."""
    source = checkpoint_directory("toy")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(source / name, directory / name)
    config = json.loads((source / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(directory)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(2.0)
    model.save_pretrained(directory / "saved")
    for file in (directory / "saved").glob("*.safetensors"):
        shutil.move(file, directory / file.name)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tied"))


def load_torch(directory: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


def random_image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encode(processor: Processor, text: str, sizes: list[tuple[int, int]]) -> EncodedPrompt:
    images = [patch_image(random_image(n, *size), size, processor.vision) for n, size in enumerate(sizes)]
    return processor.encode_parts("test", text, images)


def raster_patches(prompt: EncodedPrompt, processor: Processor) -> list[np.ndarray]:
    """The patches as the Hugging Face processor orders them: raster order of merged units."""
    merge2 = processor.vision.merge**2
    ordered = []
    for image in prompt.images:
        units = image.patches_sc.reshape(-1, merge2, image.patches_sc.shape[1])
        ordered.append(units[image.unit_k].reshape(-1, image.patches_sc.shape[1]))
    return ordered


def torch_logits(model: Qwen2_5_VLForConditionalGeneration, prompt: EncodedPrompt, processor: Processor, tail=()):
    ids = torch.tensor(np.concatenate([prompt.tokens_p, np.asarray(tail, np.int32)]).astype(np.int64))[None]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        arguments["pixel_values"] = torch.from_numpy(np.concatenate(raster_patches(prompt, processor)))
        arguments["image_grid_thw"] = torch.tensor([[1, *image.grid] for image in prompt.images])
        arguments["mm_token_type_ids"] = (ids == processor.image_id).int()
    return model(**arguments).logits[0]


CASES = {
    "text": [[]],
    "image": [[(112, 112)]],
    "partial windows": [[(140, 84)]],
    "several images": [[(112, 112), (56, 140), (28, 28)]],
    "padding": [[(112, 112)], [(84, 56), (112, 168)], []],
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tied: bool, checkpoint: Path, tmp_path: Path) -> None:
    directory = checkpoint if tied else make_checkpoint(tmp_path, tie_word_embeddings=False)
    processor = Processor.load(directory, 112, "toy", 256)
    prompts = [encode(processor, f"where is number {n}?", sizes) for n, sizes in enumerate(CASES[case])]
    model = load_torch(directory)
    with jax.set_mesh(make_mesh("1x1")):
        policy, dims = load_hf(directory)
        ours = jax.jit(lambda policy, batch: prompt_logits(policy, batch, Pass(dims, TRAIN, jnp.dtype("float32"))))(
            policy, processor.batch(prompts, multiple=8)
        )
    for row, prompt in enumerate(prompts):
        theirs = torch_logits(model, prompt, processor).detach().numpy()
        difference = np.abs(np.asarray(ours[row, : len(theirs)]) - theirs).max()
        assert difference <= RELATIVE * np.abs(theirs).max()
