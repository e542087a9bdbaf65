"""Whole prompts against the Hugging Face processor: ids, pixels, token kinds and M-RoPE positions, all exactly.

The oracle is ``Qwen2_5_VLProcessor`` (with its PIL image processor) and ``get_rope_index``. The released tokenizer is
not part of this repository; what stands in for it has Qwen2's splitting expression, byte-level BPE with merges learnt
from the toy world, and Qwen2.5's 22 added tokens under their real ids, 151643 to 151664.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_checkpoint import SIZES, hub_config
from hub_size import hub_size
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch_policy import torch_inputs
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from segzero_jax.hub import TOY
from segzero_jax.patches import patch_image
from segzero_jax.processor import EncodedPrompt, Processor

ROOT = Path(__file__).parents[2]
FIRST_SPECIAL = 151643


def write_tokenizer(directory: Path) -> None:
    """The toy tokenizer with its added tokens at Qwen's ids, and entries that no text gives up to there."""
    tokenizer = json.loads((TOY / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    learnt = len(vocabulary)
    vocabulary |= {f"unused {i}": i for i in range(learnt, FIRST_SPECIAL)}
    for token in tokenizer["added_tokens"]:
        token["id"] += FIRST_SPECIAL - learnt
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_bytes((TOY / "tokenizer_config.json").read_bytes())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released checkpoint without its weights."""
    path = tmp_path_factory.mktemp("released")
    write_tokenizer(path)
    (path / "config.json").write_text(json.dumps(hub_config(SIZES["7B"])))
    (path / "preprocessor_config.json").write_bytes((TOY / "preprocessor_config.json").read_bytes())
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> Processor:
    return Processor.load(directory, 840, "seg_zero", 4096)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Qwen2_5_VLProcessor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(directory)
    return Qwen2_5_VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLModel:
    """Without weights: it only counts positions."""
    with torch.device("meta"):
        return Qwen2_5_VLModel(Qwen2_5_VLConfig.from_dict(hub_config(SIZES["7B"].cut(layers=1, depth=1))))


def noise(sizes: list[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def encode(processor: Processor, text: str, pictures: list[Image.Image]) -> EncodedPrompt:
    return processor.encode_parts("p", text, [patch_image(p, hub_size(p), processor.vision) for p in pictures])


def turn(text: str, pictures: list[Image.Image]) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ask(theirs: Qwen2_5_VLProcessor, turns: list[list[dict[str, Any]]], **options: Any) -> Any:
    return theirs.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def assert_equal(prompt: EncodedPrompt, asked: Any, ours: Processor, model: Qwen2_5_VLModel) -> None:
    inputs = torch_inputs(prompt, ours)
    assert prompt.tokens_p.tolist() == asked["input_ids"][0].tolist()
    if prompt.images:
        np.testing.assert_array_equal(inputs["image_grid_thw"], asked["image_grid_thw"])
        np.testing.assert_array_equal(inputs["pixel_values"], asked["pixel_values"])
        np.testing.assert_array_equal(inputs["mm_token_type_ids"], asked["mm_token_type_ids"])
    grids = asked["image_grid_thw"] if prompt.images else None
    positions, delta = model.get_rope_index(asked["input_ids"], asked["mm_token_type_ids"], image_grid_thw=grids)
    np.testing.assert_array_equal(prompt.positions_3p, positions[:, 0])
    assert prompt.next_position == len(prompt.tokens_p) + int(delta)


def test_the_special_tokens_are_qwens(ours: Processor) -> None:
    assert (ours.pad_id, ours.end_ids, ours.image_id) == (151643, (151645, 151643), 151655)
    assert ours.visual_ids == (151652, 151653, 151654, 151655, 151656)


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [(840, 840)],  # a training picture
        [(111, 115)],  # one window
        [(28, 28)],  # one token, after growing to the least area
        [(640, 427)],  # as in COCO
        [(1000, 31)],
        [(37, 900)],
        [(203, 61), (50, 291), (99, 99)],
    ],
    ids=str,
)
def test_prompts_are_equal(
    sizes: list[tuple[int, int]], ours: Processor, theirs: Qwen2_5_VLProcessor, model: Qwen2_5_VLModel
) -> None:
    text = "Please find 'the 2nd zebra, from the left' with bbox and points. {'bbox': [10,100,200,210]}\n é 猫 "
    pictures = noise(sizes)
    assert_equal(encode(ours, text, pictures), ask(theirs, [turn(text, pictures)]), ours, model)


@given(
    st.lists(st.tuples(st.integers(10, 150), st.integers(10, 150)), max_size=3),
    st.text(st.characters(exclude_characters="<", exclude_categories=("Cs",)), min_size=1, max_size=40),
)
@settings(max_examples=40)
def test_any_prompt_is_equal(
    ours: Processor, theirs: Qwen2_5_VLProcessor, model: Qwen2_5_VLModel, sizes: list[tuple[int, int]], text: str
) -> None:
    pictures = noise(sizes)
    assert_equal(encode(ours, text, pictures), ask(theirs, [turn(text, pictures)]), ours, model)


def test_a_padded_batch_is_equal(ours: Processor, theirs: Qwen2_5_VLProcessor, model: Qwen2_5_VLModel) -> None:
    rows = [("the red one", [(111, 115)]), ("which of them is it?", [(203, 61), (50, 291)]), ("nothing", [])]
    pictures = [noise(sizes, seed) for seed, (_, sizes) in enumerate(rows)]
    turns = [turn(text, shown) for (text, _), shown in zip(rows, pictures, strict=True)]
    asked = ask(theirs, turns, processor_kwargs={"padding": True, "padding_side": "right"})
    batch = ours.batch([encode(ours, text, shown) for (text, _), shown in zip(rows, pictures, strict=True)], multiple=1)
    np.testing.assert_array_equal(batch.tokens_bp, asked["input_ids"])
    real = asked["attention_mask"].numpy().astype(bool)
    np.testing.assert_array_equal(batch.length_b, real.sum(1))
    positions, delta = model.get_rope_index(
        asked["input_ids"],
        asked["mm_token_type_ids"],
        image_grid_thw=asked["image_grid_thw"],
        attention_mask=asked["attention_mask"],
    )
    for row, seen in enumerate(real):
        np.testing.assert_array_equal(batch.positions_b3p[row][:, seen], positions[:, row].numpy()[:, seen])
    np.testing.assert_array_equal(batch.next_position_b, real.sum(1) + delta[:, 0].numpy())


def test_the_files_that_transformers_writes_are_read(
    directory: Path, ours: Processor, theirs: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    """It keeps picture settings in processor_config.json, and the configuration nested."""
    theirs.save_pretrained(tmp_path)
    Qwen2_5_VLConfig.from_pretrained(directory).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    again = Processor.load(tmp_path, 840, "seg_zero", 4096)
    assert again.vision == ours.vision
    assert again.visual_ids == ours.visual_ids
    text = "the 2nd zebra"
    np.testing.assert_array_equal(encode(again, text, []).tokens_p, encode(ours, text, []).tokens_p)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"image_std": [1, 1, 1]}}')
    with pytest.raises(ValueError, match="image_mean None: expected three numbers"):
        Processor.load(tmp_path, 840, "seg_zero", 4096)


WITHOUT = """
import importlib.abc, sys
import numpy as np
from PIL import Image

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from segzero_jax.patches import patch_image
from segzero_jax.processor import Processor

processor = Processor.load(sys.argv[1], 840, "seg_zero", 4096)
picture = Image.open(sys.argv[2])
patched = patch_image(picture, (196, 56), processor.vision)
prompt = processor.encode_parts("p", "the 2nd zebra", [patched])
batch = processor.batch([prompt], multiple=1)
np.savez(sys.argv[3], **{name: array for name, array in batch._asdict().items() if array is not None})
assert not {"torch", "torchvision", "transformers"} & set(sys.modules)
"""


def test_neither_torch_nor_transformers_is_needed(directory: Path, ours: Processor, tmp_path: Path) -> None:
    (picture,) = noise([(203, 61)])
    picture.save(tmp_path / "picture.png")
    files = [directory, tmp_path / "picture.png", tmp_path / "batch.npz"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = np.load(files[-1])
    batch = ours.batch([encode(ours, "the 2nd zebra", [picture])], multiple=1)._asdict()
    assert set(made.files) == {name for name, array in batch.items() if array is not None}
    for name in made.files:
        np.testing.assert_array_equal(made[name], batch[name])
