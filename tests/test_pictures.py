"""Stored pictures: what the policy and the segmenter decode from them is the same, whatever the source had."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps
from question_sources import deep_rgb_png, encoded, picture

from reward_server.codec import CodecError
from reward_server.codec import decode_image as as_the_segmenter
from segzero_jax.data import pictures
from segzero_jax.data.pictures import PictureError, fingerprint, fit_mask, read_picture, upright_size
from segzero_jax.patches import ImageError
from segzero_jax.patches import decode_image as as_the_policy
from segzero_jax.types import Frame

RGB = picture(1)
ALPHA = np.dstack([np.asarray(RGB), np.where(np.arange(128) < 64, 255, 0)[None].repeat(96, 0).astype(np.uint8)])
DEEP = (np.arange(128 * 96).reshape(96, 128) * 5).astype(np.uint16)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # A quarter turn: stored lying, shown upright.
OVER = Image.Exif()
OVER[0x0112] = 3
KINDS = {
    "jpeg": encoded(RGB),
    "grey jpeg": encoded(RGB.convert("L")),
    "cmyk jpeg": encoded(RGB.convert("CMYK")),
    "turned jpeg": encoded(RGB, exif=TURNED),
    "upside down": encoded(RGB, exif=OVER),
    "png": encoded(RGB, "PNG"),
    "png with a hole": encoded(RGB, "PNG", transparency=RGB.getpixel((9, 9))),
    "rgba png": encoded(Image.fromarray(ALPHA), "PNG"),
    "grey and alpha png": encoded(Image.fromarray(ALPHA).convert("LA"), "PNG"),
    "16-bit png": encoded(Image.fromarray(DEEP), "PNG"),
    "palette png": encoded(RGB.convert("P"), "PNG"),
    "palette png with a hole": encoded(RGB.convert("P"), "PNG", transparency=3),
    "1-bit png": encoded(RGB.convert("1"), "PNG"),
    "webp": encoded(RGB, "WEBP"),
    "webp with alpha": encoded(Image.fromarray(ALPHA), "WEBP"),
    "animated webp": encoded(RGB, "WEBP", save_all=True, append_images=[picture(2)]),
    "gif": encoded(RGB, "GIF"),
    "bmp": encoded(RGB, "BMP"),
    "tiff": encoded(RGB, "TIFF"),
}


def with_exif(exif: bytes, kind: str) -> bytes:
    """A picture with these bytes for EXIF, which Pillow does not look at when it writes them."""
    return encoded(RGB, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"MM", b"MM\0*", b"II*\0\x08", b"MM\0*\0\0\0\x08\0", b"none at all"])
def test_damaged_exif_costs_no_picture(exif: bytes, kind: str) -> None:
    """It says which side is up, and nothing of the pixels."""
    data = with_exif(exif, kind)
    expected = np.asarray(as_the_segmenter(data))
    assert read_picture(data, None).frame == Frame(*RGB.size)
    assert upright_size(data) == Frame(*RGB.size)
    np.testing.assert_array_equal(np.asarray(as_the_policy(data, "x")), expected)
    np.testing.assert_array_equal(np.asarray(as_the_policy(read_picture(data, None).data, "x")), expected)


def test_a_truncated_png_is_damaged_wherever_its_exif_is() -> None:
    data = encoded(RGB, "PNG", exif=TURNED)
    with pytest.raises(PictureError):
        read_picture(data[: len(data) // 2], None)
    with pytest.raises(PictureError):
        read_picture(encoded(RGB, "PNG")[: len(data) // 2], None)


def test_nothing_is_longer_than_a_jpeg() -> None:
    """To scale what is one pixel wide takes a row of the new width for each of its own."""
    tall = encoded(Image.new("L", (1, 65_501)), "PNG")
    with pytest.raises(PictureError, match="picture of 1x65501 pixels, expected at most 200000000, 65500 a side"):
        read_picture(tall, None)
    with pytest.raises(ImageError, match="x: image of 1x65501, expected at most 65500 pixels a side"):
        as_the_policy(tall, "x")
    with pytest.raises(CodecError, match="image: 1 x 65501 pixels, expected at most 65500 a side"):
        as_the_segmenter(tall)
    assert as_the_segmenter(encoded(Image.new("L", (1, 65_500)), "PNG")).shape == (65_500, 1, 3)


KINDS["16-bit rgb png"] = deep_rgb_png(np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]]))


def reopened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_segmenter_see_the_same(kind: str) -> None:
    stored = read_picture(KINDS[kind], None)
    policy = np.asarray(as_the_policy(stored.data, kind))
    np.testing.assert_array_equal(policy, as_the_segmenter(stored.data))
    assert policy.shape == (stored.frame.height, stored.frame.width, 3)
    file = reopened(stored.data)
    assert file.format in ("PNG", "JPEG", "WEBP")
    assert file.mode in ("RGB", "L")
    assert "transparency" not in file.info
    assert (file.getexif().get(0x0112, 1), getattr(file, "n_frames", 1)) == (1, 1)
    assert stored.frame == stored.original == (Frame(96, 128) if "turned" in kind else Frame(128, 96))


@pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "png", "webp"])
def test_plain_files_are_stored_as_they_are(kind: str) -> None:
    assert read_picture(KINDS[kind], None).data == KINDS[kind]


@pytest.mark.parametrize("kind", ["16-bit png", "16-bit rgb png"])
def test_of_sixteen_bits_eight_are_stored(kind: str) -> None:
    assert read_picture(KINDS[kind], None).data[24] == 8


def test_what_the_pixels_become() -> None:
    shown = {kind: as_the_segmenter(read_picture(KINDS[kind], None).data).astype(int) for kind in KINDS}
    original, lossy = (np.asarray(reopened(KINDS[kind])).astype(int) for kind in ("png", "jpeg"))
    assert np.abs(shown["turned jpeg"] - np.rot90(lossy, -1)).mean() < 2, "upright"
    assert np.abs(shown["upside down"] - lossy[::-1, ::-1]).mean() < 2
    np.testing.assert_array_equal(shown["rgba png"][:, :64], original[:, :64])
    np.testing.assert_array_equal(shown["rgba png"][:, 64:], 255)
    np.testing.assert_array_equal(shown["16-bit png"][..., 0], DEEP >> 8)
    np.testing.assert_array_equal(shown["16-bit rgb png"][..., 0], DEEP >> 8)
    cmyk = np.asarray(reopened(KINDS["cmyk jpeg"]).convert("RGB")).astype(int)
    assert np.abs(shown["cmyk jpeg"] - cmyk).mean() < 2
    np.testing.assert_array_equal(shown["bmp"], original)


def test_annotations_on_unturned_pixels_keep_them_unturned() -> None:
    lying = read_picture(KINDS["turned jpeg"], Frame(128, 96))
    assert lying.frame == Frame(128, 96)
    source = np.asarray(reopened(KINDS["jpeg"])).astype(int)
    assert np.abs(as_the_segmenter(lying.data).astype(int) - source).mean() < 2
    assert read_picture(KINDS["turned jpeg"], Frame(96, 128)).frame == Frame(96, 128)
    with pytest.raises(PictureError, match="picture of 128x96 pixels, expected the annotated 100x96"):
        read_picture(KINDS["jpeg"], Frame(100, 96))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_turned_picture_of_any_kind_is_upright_and_has_its_size(turn: int, kind: str) -> None:
    """Pillow turns a TIFF by itself."""
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {} if kind in ("PNG", "TIFF") else {"quality": 95}
    data = encoded(RGB, kind, exif=exif, **options)
    found = read_picture(data, None)
    expected = ImageOps.exif_transpose(reopened(data)).convert("RGB")
    assert found.frame == found.original == upright_size(data) == Frame(*expected.size)
    shown = as_the_segmenter(found.data).astype(int)
    assert np.abs(shown - np.asarray(expected).astype(int)).mean() < 2


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_picture_whose_exif_nobody_can_write_is_upright(turn: int) -> None:
    """A resolution of -1/0, as some cameras have it: Pillow's own turning writes EXIF again, and ends with an error."""
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8))
    entries = (0x0112, 3, 1, struct.pack("<H", turn)), (0x011A, 10, 1, struct.pack("<I", 38))
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    exif = b"II*\0" + struct.pack("<IH", 8, 2) + fields + struct.pack("<Iii", 0, -1, 0)
    stored = as_the_segmenter(read_picture(encoded(square, "PNG", exif=b"Exif\0\0" + exif), None).data)
    expected = np.asarray(ImageOps.exif_transpose(reopened(encoded(square, "PNG", exif=b"Exif\0\0" + plain(turn)))))
    np.testing.assert_array_equal(stored[..., 0], expected)


def plain(turn: int) -> bytes:
    """EXIF that says how a picture is turned, and nothing else."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, turn, 0)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_damaged_file_is_told(kind: str) -> None:
    for data in (KINDS[kind][:-400], b"GIF87a", b"", b"\x00" * 100):
        with pytest.raises(PictureError, match="picture cannot be read") as caught:
            read_picture(data, None)
        assert "\n" not in str(caught.value)


def test_a_picture_without_a_white_point_is_told() -> None:
    """Pillow makes black of numbers from 0 to 1."""
    numbers = encoded(Image.fromarray(np.linspace(0, 1, 128 * 96, dtype=np.float32).reshape(96, 128)), "TIFF")
    with pytest.raises(PictureError, match="picture of floating-point numbers, expected 8 or 16 bits a channel"):
        read_picture(numbers, None)


def test_too_large_pictures_are_scaled_down_with_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 4000)
    stored = read_picture(KINDS["png"], Frame(128, 96))
    assert stored.original == Frame(128, 96)
    assert stored.frame == Frame(73, 54)
    mask = np.zeros((96, 128), bool)
    mask[:48, :64] = True
    fitted = fit_mask(mask, stored.frame)
    assert fitted.shape == (54, 73)
    assert fitted.mean() == pytest.approx(0.25, abs=0.01)


def test_too_large_files_become_jpegs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG that is stored as it is, and what is written again as one."""
    size = len(KINDS["png"])
    for most, kind in ((size, "PNG"), (size - 1, "JPEG")):
        monkeypatch.setattr(pictures, "MAX_BYTES", most)
        for source in ("png", "bmp"):
            stored = read_picture(KINDS[source], None)
            assert reopened(stored.data).format == kind
            assert stored.frame == stored.original == Frame(128, 96)
            assert np.abs(as_the_segmenter(stored.data).astype(int) - np.asarray(RGB)).mean() < 3


def test_a_picture_that_would_fill_the_memory_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_MAX_DECODED", 128 * 96)
    read_picture(KINDS["png"], None)
    monkeypatch.setattr(pictures, "_MAX_DECODED", 128 * 96 - 1)
    with pytest.raises(PictureError, match="picture of 128x96 pixels, expected at most 12287") as caught:
        read_picture(KINDS["png"], None)
    assert caught.value.kind == "picture of too many pixels"


def bits(image: Image.Image) -> np.ndarray:
    return np.unpackbits(np.frombuffer(fingerprint(image), np.uint8))


def test_a_fingerprint_survives_what_data_sets_do_to_pictures_and_tells_pictures_apart() -> None:
    for seed in range(4):
        original = reopened(encoded(picture(seed, 320, 240), quality=90))
        squashed = picture(seed, 320, 240).resize((420, 420), Image.Resampling.BICUBIC)
        for other in (encoded(squashed, "PNG"), encoded(squashed, quality=60), encoded(squashed.resize((200, 150)))):
            assert (bits(original) != bits(reopened(other))).sum() <= 20
        assert (bits(original) != bits(picture(seed + 1000, 320, 240))).sum() > 60
