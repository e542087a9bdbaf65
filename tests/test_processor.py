"""The processor against Hugging Face's own: equal ids, bits and positions."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hub_size import hub_size
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from segzero_jax.patches import ImageError, decode_image, patch_image, window_order
from segzero_jax.processor import EncodedPrompt, Processor, PromptTooLong, mrope_positions, settings_directory
from segzero_jax.prompt import question_text
from segzero_jax.types import Example, Frame, PromptBatch

ASSETS = Path(settings_directory("toy"))
ROOT = Path(__file__).parents[1]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)


def png(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def example(question: str = "The red circle.", image: bytes | None = None) -> Example:
    return Example("toy-1", png(picture(208, 240)) if image is None else image, Frame(208, 240), question, (), None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the toy tokenizer and a config.json as transformers writes it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (directory / name).write_bytes((ASSETS / name).read_bytes())
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56}
    vision |= {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=502, video_token_id=503, vision_start_token_id=499
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Processor:
    return Processor.load(checkpoint, image_size=112, wording="toy", max_prompt_tokens=64)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Qwen2_5_VLModel:
    return Qwen2_5_VLModel(Qwen2_5_VLConfig.from_pretrained(checkpoint))


def raster_rank_of_hub_order(rows: int, columns: int, merge: int) -> np.ndarray:
    """Raster index of each patch in the order of ``Qwen2VLImageProcessorPil``: merged unit by merged unit."""
    grid = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return grid.transpose(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize(
    ("width", "height"), [(112, 112), (840, 840), (300, 200), (97, 411), (33, 1200), (13, 500), (14, 14), (5, 900)]
)
def test_pixels_are_bit_equal_to_the_hugging_face_processor(processor: Processor, width: int, height: int) -> None:
    image = picture(width, height)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(ASSETS)(images=[image], return_tensors="np")
    ours = patch_image(image, hub_size(image), processor.vision)
    rows, columns = (int(v) for v in theirs["image_grid_thw"][0, 1:])
    assert ours.grid == (rows, columns)
    assert ours.patches_sc.dtype == np.float32
    at = raster_rank_of_hub_order(rows, columns, 2)
    theirs_by_place = np.empty_like(theirs["pixel_values"])
    theirs_by_place[at] = theirs["pixel_values"]
    place = ours.patch_hw_s2[ours.valid_s] @ np.array([columns, 1])
    np.testing.assert_array_equal(ours.patches_sc[ours.valid_s], theirs_by_place[place])
    assert not ours.patches_sc[~ours.valid_s].any()


@pytest.mark.parametrize("filter_name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(208, 240), (112, 240)])
def test_squash_equals_pil_then_the_hugging_face_processor(size: tuple[int, int], filter_name: str) -> None:
    processor = Processor.load("toy", 112, "toy", 64, filter_name)
    image = picture(*size)
    encoded = processor.encode(example(image=png(image)))
    squashed = image.resize((112, 112), {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[filter_name])
    theirs = Qwen2VLImageProcessorPil.from_pretrained(ASSETS)(images=[squashed], return_tensors="np")
    index, _ = get_vision_window_index(torch.tensor([[1, 8, 8]]), 2, 56, 14)
    theirs_in_windows = theirs["pixel_values"].reshape(16, 4, -1)[index.numpy()].reshape(64, -1)
    np.testing.assert_array_equal(encoded.images[0].patches_sc, theirs_in_windows)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    window=st.sampled_from([2, 4, 8]),
    merge=st.sampled_from([1, 2]),
)
@settings(max_examples=60)
def test_windows_are_those_of_transformers_and_share_runs(rows: int, columns: int, window: int, merge: int) -> None:
    h, w = rows * merge, columns * merge
    slots, units = window_order(h, w, merge, window)
    index, bounds = get_vision_window_index(torch.tensor([[1, h, w]]), merge, window, 1)
    hub_units = raster_rank_of_hub_order(h, w, merge).reshape(-1, merge**2)
    hub_patches = hub_units[index.numpy()].reshape(-1)
    expected = {tuple(part) for part in np.split(hub_patches, bounds.numpy()[1:-1]) if part.size}
    # A window's patches stand side by side in one run, in transformers' order, and each patch stands somewhere once.
    found = set()
    for run in slots.reshape(-1, window**2):
        of_window = [patch // w // window * w + patch % w // window for patch in run[run >= 0]]
        cuts = np.flatnonzero(np.diff(of_window)) + 1
        found |= {tuple(part) for part in np.split(run[run >= 0], cuts)}
    assert found == expected
    np.testing.assert_array_equal(np.sort(slots[slots >= 0]), np.arange(h * w))
    # The k-th image token finds its own unit.
    np.testing.assert_array_equal(slots.reshape(-1, merge**2)[units], hub_units)


@pytest.mark.parametrize(("side", "slots"), [(60, 3648), (64, 4096), (8, 64), (4, 64)])
def test_partial_windows_leave_few_slots_empty(side: int, slots: int) -> None:
    """840 x 840 pixels are 3,600 patches: 14 half windows share 7 runs, and the corner has one."""
    assert len(window_order(side, side, 2, 8)[0]) == slots


def hub_prompt(text: str, grids: list[tuple[int, int]]) -> str:
    images = "".join(f"<|vision_start|>{'<|image_pad|>' * (r * c)}<|vision_end|>" for r, c in grids)
    return (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_ids_equal_auto_tokenizer_and_its_chat_template(processor: Processor, tokenizer) -> None:
    encoded = processor.encode(example("The RED circle.."))
    text = question_text("toy", "the red circle")
    assert encoded.tokens_p.tolist() == tokenizer(hub_prompt(text, [(4, 4)])).input_ids
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    templated = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert templated.replace("<|image_pad|>", "<|image_pad|>" * 16) == hub_prompt(text, [(4, 4)])


@given(st.text(max_size=60))
@settings(max_examples=150)
def test_any_text_has_the_ids_of_auto_tokenizer_and_comes_back(processor: Processor, tokenizer, text: str) -> None:
    assert processor.encode_text(text) == tokenizer(text).input_ids
    ids = processor.encode_text(text)
    assert processor.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


GRIDS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=3)


@given(GRIDS, st.sampled_from(["Find.", 'Find "the red circle".', "x"]))
@settings(max_examples=60)
def test_positions_equal_transformers(model: Qwen2_5_VLModel, processor: Processor, tokenizer, grids, text) -> None:
    tokens = np.array(tokenizer(hub_prompt(text, grids)).input_ids, np.int32)
    positions, following = mrope_positions(tokens, processor.image_id, grids)
    ids = torch.tensor(tokens)[None].long()
    thw = torch.tensor([[1, 2 * r, 2 * c] for r, c in grids]) if grids else None
    theirs, delta = model.get_rope_index(ids, (ids == 502).int(), image_grid_thw=thw)
    np.testing.assert_array_equal(positions, theirs[:, 0].numpy())
    # transformers places the token after the prompt at length + delta.
    assert following == len(tokens) + int(delta)


def test_positions_refuse_a_wrong_number_of_images(processor: Processor) -> None:
    with pytest.raises(ValueError, match="1 runs of image tokens, expected one for each of 2 images"):
        mrope_positions(np.array([1, 502, 2], np.int32), 502, [(1, 1), (1, 1)])


def encode_pictures(processor: Processor, sizes: list[tuple[int, int]]) -> EncodedPrompt:
    images = [patch_image(picture(*size, seed=n), size, processor.vision) for n, size in enumerate(sizes)]
    return processor.encode_parts(f"p{len(sizes)}", "Find.", images)


def test_batch_pads_and_every_image_token_finds_its_pixels(processor: Processor) -> None:
    sizes = [[(112, 112)], [], [(84, 56), (140, 28)]]
    prompts = [encode_pictures(processor, s) for s in sizes]
    batch = processor.batch(prompts, multiple=16)
    assert batch.tokens_bp.shape == (3, 48)
    assert batch.patches_bisc.shape == (3, 2, 64, 1176)
    assert batch.length_b.tolist() == [len(p.tokens_p) for p in prompts]
    assert not batch.patch_valid_bis[1].any()
    assert batch.patch_valid_bis.sum((1, 2)).tolist() == [64, 0, 24 + 20]
    for row, (prompt, pictures) in enumerate(zip(prompts, sizes, strict=True)):
        valid = np.arange(48) < batch.length_b[row]
        assert (batch.tokens_bp[row][~valid] == processor.pad_id).all()
        np.testing.assert_array_equal(batch.positions_b3p[row][:, valid], prompt.positions_3p)
        np.testing.assert_array_equal(batch.image_index_bp[row] >= 0, batch.tokens_bp[row] == processor.image_id)
        # By index, the merged patches of the image tokens are those of Hugging Face, picture after picture.
        merged = batch.patches_bisc[row].reshape(-1, 4 * 1176)[
            batch.image_index_bp[row][batch.image_index_bp[row] >= 0]
        ]
        expected = [patches_of_hugging_face(picture(*size, seed=n)) for n, size in enumerate(pictures)]
        np.testing.assert_array_equal(merged, np.concatenate(expected) if expected else np.zeros((0, 4 * 1176)))
        hw = batch.patch_hw_bis2[row].reshape(-1, 4, 2)[batch.image_index_bp[row][batch.image_index_bp[row] >= 0]]
        assert (hw[:, 3] - hw[:, 0] == 1).all()


def patches_of_hugging_face(image: Image.Image) -> np.ndarray:
    made = Qwen2VLImageProcessorPil.from_pretrained(ASSETS)(images=[image], return_tensors="np", do_resize=False)
    return made["pixel_values"].reshape(-1, 4 * 1176)


def test_text_only_batch_and_default_padding(processor: Processor) -> None:
    batch = processor.batch([encode_pictures(processor, [])] * 2)
    assert batch.tokens_bp.shape == (2, 64)
    assert batch.patches_bisc.shape == (2, 0, 0, 1176)
    assert (batch.image_index_bp == -1).all()
    np.testing.assert_array_equal(
        batch.positions_b3p[0, :, : batch.length_b[0]], np.arange(batch.length_b[0])[None].repeat(3, 0)
    )


def test_too_long_prompt_names_id_count_and_limit(checkpoint: Path, processor: Processor) -> None:
    longest = len(processor.encode(example()).tokens_p)
    just = Processor.load(checkpoint, image_size=112, wording="toy", max_prompt_tokens=longest)
    assert len(just.encode(example()).tokens_p) == longest
    just = Processor.load(checkpoint, image_size=112, wording="toy", max_prompt_tokens=longest - 1)
    with pytest.raises(PromptTooLong, match=f"max_prompt_tokens={longest - 1}"):
        just.encode(example())
    with pytest.raises(PromptTooLong, match=r"toy-1: prompt of \d+ tokens \(16 of them image\).*max_prompt_tokens=64"):
        processor.encode(example("the red circle " * 30))


@pytest.mark.parametrize(
    "left",
    [
        {"truncation": {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 8}},
        {"padding": {"strategy": {"Fixed": 300}, "pad_to_multiple_of": None}},
    ],
    ids=["truncation", "padding", "padding to a length"],
)
def test_what_a_tokenizers_last_call_cut_or_filled_is_no_part_of_it(
    checkpoint: Path, tmp_path: Path, processor: Processor, left: dict[str, dict]
) -> None:
    """``save_pretrained`` after ``processor(..., padding=True, truncation=True)`` writes both into the file."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if "padding" in left:
        token = {"direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
        left = {"padding": token | left["padding"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | left))
    other = Processor.load(tmp_path, image_size=112, wording="toy", max_prompt_tokens=64)
    asked = ["The red circle.", "The red circle that is left of the large blue square at the top."]
    for question in asked:
        np.testing.assert_array_equal(
            other.encode(example(question)).tokens_p, processor.encode(example(question)).tokens_p
        )
    np.testing.assert_array_equal(other.count_tokens(asked), processor.count_tokens(asked))


def test_special_tokens_in_a_question_are_text(processor: Processor) -> None:
    encoded = processor.encode_parts("p", "Find <|image_pad|><|im_end|>.", [])
    assert processor.image_id not in encoded.tokens_p
    assert (encoded.tokens_p == processor.end_ids[0]).sum() == 2
    assert "Find <|image_pad|><|im_end|>." in processor.decode(encoded.tokens_p)


def test_decode_leaves_out_special_and_unknown_tokens(processor: Processor) -> None:
    ids = [*processor.encode_text("<think> red </think>"), processor.end_ids[0], processor.pad_id, 700]
    assert processor.decode(ids) == "<think> red </think>"
    assert processor.decode(np.array(ids, np.int32)) == "<think> red </think>"


def test_special_ids_are_in_the_order_of_qwen(processor: Processor) -> None:
    first = processor.pad_id
    assert processor.end_ids == (first + 2, first)
    assert processor.visual_ids == tuple(range(first + 9, first + 14))
    assert processor.image_id == first + 12


def test_modes_become_rgb_on_white_and_upright() -> None:
    grey16 = Image.fromarray(np.full((4, 6), 0x80FF, np.uint16))
    assert decode_image(png(grey16), "x").getpixel((0, 0)) == (128, 128, 128)
    assert decode_image(png(Image.new("L", (4, 4), 7)), "x").getpixel((0, 0)) == (7, 7, 7)
    assert decode_image(png(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), "x").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(png(palette), "x").getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(png(palette, transparency=1), "x").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert decode_image(png(turned, "JPEG", exif=exif), "x").size == (8, 4)


def test_unreadable_pictures_name_the_example() -> None:
    whole = png(picture(40, 40))
    for data in (b"", b"not a picture", whole[: len(whole) // 2], whole[:20], png(Image.new("RGB", (4, 4)), "BMP")):
        with pytest.raises(ImageError, match=r"^toy-9: [^\n]*$"):
            decode_image(data, "toy-9")
    with pytest.raises(ImageError, match="toy-9: image of 9000x9000 pixels, expected at most 64000000"):
        decode_image(png(Image.new("1", (9000, 9000))), "toy-9")


@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
)
@settings(max_examples=200)
def test_damaged_pictures_decode_or_raise_image_error(format: str, damage: list[tuple[int, int]]) -> None:
    data = bytearray(png(picture(16, 12), format))
    for at, value in damage:
        data[at % len(data)] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data), "x").mode == "RGB"


def test_hub_form_of_the_config_gives_the_same_settings(checkpoint: Path, tmp_path: Path, processor: Processor) -> None:
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    vision = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "hidden_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 16, "vision_config": vision}))
    assert Processor.load(tmp_path, 112, "toy", 64).vision == processor.vision
    # Older versions of transformers write this one beside the picture settings, newer ones write them into it.
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    assert Processor.load(tmp_path, 112, "toy", 64).vision == processor.vision
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert Processor.load(tmp_path, 112, "toy", 64).vision == processor.vision


def test_load_says_what_is_missing_or_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        Processor.load("nowhere", 112, "toy", 64)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        Processor.load(tmp_path, 112, "toy", 64)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        Processor.load(tmp_path, 112, "toy", 64)
    with pytest.raises(ValueError, match="image_size=100: expected a multiple of 28"):
        Processor.load(checkpoint, 100, "toy", 64)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"patch_size": 16}}))
    (tmp_path / "preprocessor_config.json").write_bytes((checkpoint / "preprocessor_config.json").read_bytes())
    with pytest.raises(ValueError, match=r"patch_size=14 and merge_size=2, config\.json has 16 and 2"):
        Processor.load(tmp_path, 112, "toy", 64)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("preprocessor_config.json", b"[1]", "preprocessor_config.json: expected a JSON object, got [1]"),
        ("preprocessor_config.json", b"{\xff}", "preprocessor_config.json: not JSON: 'utf-8' codec"),
        ("config.json", b"null", "config.json: expected a JSON object, got null"),
        ("processor_config.json", b'{"image_processor": []}', "image_processor: expected a JSON object, got []"),
        ("image_mean", "abc", "image_mean 'abc': expected three numbers"),
        ("image_mean", 3, "image_mean 3: expected three numbers"),
        ("image_mean", [0.5, 0.5], "image_mean [0.5, 0.5]: expected three numbers"),
        ("image_mean", [0.5, 0.5, "x"], "image_mean [0.5, 0.5, 'x']: expected three numbers"),
        ("image_mean", [0.5, 0.5, True], "image_mean [0.5, 0.5, True]: expected three numbers"),
        ("image_std", [1, 0, 1], "image_std [1, 0, 1]: expected three numbers above 0"),
        ("image_std", [1, float("inf"), 1], "image_std [1, inf, 1]: expected three numbers above 0"),
        ("image_std", None, "image_std None: expected three numbers above 0"),
    ],
)
def test_settings_that_are_none_are_said_in_a_line(
    checkpoint: Path, tmp_path: Path, name: str, content: Any, said: str
) -> None:
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    pictures = tmp_path / "preprocessor_config.json"
    if name.startswith("image"):
        name, content = pictures.name, json.dumps(json.loads(pictures.read_text()) | {name: content}).encode()
    if name.startswith("processor"):
        pictures.unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        Processor.load(tmp_path, 112, "toy", 64)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_tokenizer_script_makes_the_packaged_files(tmp_path: Path) -> None:
    # As a module, so that the checkout is on the path whether or not the package is installed.
    subprocess.run([sys.executable, "-m", "scripts.make_toy_tokenizer", tmp_path], check=True, cwd=ROOT)
    for made in sorted(tmp_path.iterdir()):
        assert made.read_bytes() == (ASSETS / made.name).read_bytes(), made.name
    assert len(list(tmp_path.iterdir())) == 3


def test_import_needs_no_torch_transformers_or_jax_array() -> None:
    code = "import sys, segzero_jax.processor; assert not {'torch', 'transformers', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_widened_batch_is_the_batch_that_was_padded_to_that_length() -> None:
    processor = tiny.load_processor()
    rows = [tiny.encode(processor, "the red one", [(56, 56)], seed=n) for n in range(2)]
    for name, wide, plain in zip(
        PromptBatch._fields, processor.widen(processor.batch(rows, 8), 64), processor.batch(rows, 64), strict=True
    ):
        assert (wide is None and plain is None) or np.array_equal(wide, plain), name
