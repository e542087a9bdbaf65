"""Pictures and masks as they travel: read whole, or refused before they are unpacked."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from sam_calls import encoded, scene

from reward_server import codec, reward_pb2
from reward_server.codec import CodecError, decode_image, decode_mask, encode_mask


def _number(value: int) -> str:
    """As a mask's runs are written: five bits a character, lowest first, with the sign in the last one."""
    found = ""
    while True:
        bits, value = value & 31, value >> 5
        if value == (-1 if bits & 16 else 0):
            return found + chr(48 + bits)
        found += chr(48 + 32 + bits)


class TestCodec:
    def test_large_pictures_are_refused_before_they_are_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codec, "MAX_IMAGE_PIXELS", 100)
        monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
        with pytest.raises(CodecError, match=r"11 x 10 pixels, expected at most 100"):
            decode_image(encoded(np.zeros((10, 11, 3), np.uint8)))
        monkeypatch.undo()
        monkeypatch.setattr(codec, "MAX_IMAGE_PIXELS", 100)
        assert decode_image(encoded(np.zeros((10, 10, 3), np.uint8))).shape == (10, 10, 3)

    def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each goes over all pixels again and takes a few bytes: 100 KB would keep a core busy for ten seconds."""
        file = io.BytesIO()
        Image.fromarray(scene().image).save(file, "JPEG", progressive=True, quality=95)
        data = file.getvalue()
        assert 2 < data.count(b"\xff\xda") <= 12
        assert decode_image(data).shape == scene().image.shape
        last = data.rindex(b"\xff\xda")
        endless = data[:-2] + data[last:-2] * 200 + data[-2:]
        assert endless.count(b"\xff\xda") > 200
        monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
        with pytest.raises(CodecError, match=r"image: a JPEG of 2\d\d scans, expected at most 100"):
            decode_image(endless)

    def test_a_palette_png_without_its_palette_is_refused(self) -> None:
        """Pillow asserts that it is there."""
        file = b"\x89PNG\r\n\x1a\n"
        header = struct.pack(">IIBBBBB", 4, 4, 1, 3, 0, 0, 0)
        pixels = zlib.compress(b"\0\0" * 4)
        for kind, data in ((b"IHDR", header), (b"tRNS", b"\0"), (b"IDAT", pixels), (b"IEND", b"")):
            file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        with pytest.raises(CodecError, match="not a whole JPEG, PNG or WebP"):
            decode_image(file)

    @given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**32 - 1))
    def test_packed_masks_come_back(self, height: int, width: int, share: float, seed: int) -> None:
        mask = np.random.default_rng(seed).random((height, width)) < share
        packed = codec.pack_mask(mask)
        assert packed.nbytes == height * -(-width // 8)
        np.testing.assert_array_equal(codec.unpack_mask(packed, width), mask)

    @given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**32 - 1))
    def test_masks_come_back(self, height: int, width: int, share: float, seed: int) -> None:
        mask = np.random.default_rng(seed).random((height, width)) < share
        assert (decode_mask(encode_mask(mask), height, width) == mask).all()

    def test_large_masks_are_read_as_pycocotools_reads_them(self) -> None:
        rows, columns = np.mgrid[:840, :700]
        for mask in ((rows - 300) ** 2 + (columns - 400) ** 2 < 9e4, rows > 600, (rows + columns) % 97 < 50):
            rle = encode_mask(mask)
            expected = coco.decode({"size": [840, 700], "counts": rle.counts.encode()})
            assert (decode_mask(rle, 840, 700) == expected).all()
            assert (expected == mask).all()

    @given(st.one_of(st.text(max_size=30), st.text([chr(c) for c in range(48, 112)], max_size=12)))
    def test_only_whole_masks_are_read(self, counts: str) -> None:
        try:
            mask = decode_mask(reward_pb2.Rle(height=3, width=2, counts=counts), 3, 2)
        except CodecError:
            pass  # Refusing is the other right answer; anything else is raised.
        else:
            assert mask.shape == (3, 2)
            assert (decode_mask(encode_mask(mask), 3, 2) == mask).all()

    def test_endless_runs_are_refused_before_they_are_read(self) -> None:
        with pytest.raises(CodecError, match=r"10000000 characters of runs for 54 pixels"):
            decode_mask(reward_pb2.Rle(height=9, width=6, counts="0" * 10_000_000), 9, 6)
        with pytest.raises(CodecError, match=r"4194305 characters of runs, expected at most 4194304"):
            decode_mask(reward_pb2.Rle(height=4000, width=4000, counts="1" * (2**22 + 1)), 4000, 4000)

    def test_masks_of_any_texture_take_no_more_characters_than_are_read(self) -> None:
        for mask in (
            np.indices((40, 31)).sum(0) % 2 == 0,
            np.ones((1, 1), bool),
            np.arange(527).reshape(31, 17) % 17 < 1,
        ):
            assert (decode_mask(encode_mask(mask), *mask.shape) == mask).all()

    @pytest.mark.parametrize("counts", ["7N1", "N8", "0N8"])
    def test_negative_runs_are_refused_though_they_fill_the_mask(self, counts: str) -> None:
        """Runs of 7, -2 and 1, or of -2 and 8, are six pixels, too."""
        with pytest.raises(CodecError, match="not COCO's compressed run lengths"):
            decode_mask(reward_pb2.Rle(height=3, width=2, counts=counts), 3, 2)

    def test_runs_whose_sum_wraps_to_what_is_expected_are_refused(self) -> None:
        """Unpacked, they would be written far past the end of the mask."""
        height, width, most = 2000, 4000, 2**29 - 1
        # Every second run is so much longer than the one before, what six characters can say at most; others are empty.
        count, left, growth = 262154, height * width + 2**64, []
        for runs_that_grow in range(count, 0, -1):
            growth.append(min(most, left // runs_that_grow))
            left -= growth[-1] * runs_that_grow
        assert left == 0
        counts = "0" + "0".join(map(_number, growth)) + "0"
        with pytest.raises(CodecError, match="not COCO's compressed run lengths"):
            decode_mask(reward_pb2.Rle(height=height, width=width, counts=counts), height, width)

    def test_short_runs_are_refused(self) -> None:
        whole = encode_mask(np.eye(9, 6, dtype=bool))
        for end in range(len(whole.counts)):
            with pytest.raises(CodecError):
                decode_mask(reward_pb2.Rle(height=9, width=6, counts=whole.counts[:end]), 9, 6)

    @settings(max_examples=150)
    @given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
    def test_damaged_pictures_are_read_or_refused(self, kind: str, data: st.DataObject) -> None:
        damaged = bytearray(encoded(scene().image[:40, :50], kind))
        for _ in range(data.draw(st.integers(1, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        try:
            pixels = decode_image(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))
        except CodecError:
            pass
        else:
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8

    def test_pictures_with_damage_behind_their_pixels_are_refused(self) -> None:
        """An empty profile, of which Pillow reads the second byte."""
        whole = encoded(scene().image[:40, :50], "PNG")
        assert whole[-8:-4] == b"IEND"
        chunk = b"iCCP"
        damaged = whole[:-12] + struct.pack(">I", 0) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[-12:]
        with pytest.raises(CodecError, match="not a whole JPEG, PNG or WebP"):
            decode_image(damaged)

    def test_pictures_are_read_as_stored(self) -> None:
        pixels = scene().image[:40, :60]
        turned, file = Image.fromarray(pixels), io.BytesIO()
        exif = turned.getexif()
        exif[0x0112] = 6  # "turn me by 90 degrees"
        turned.save(file, "PNG", exif=exif)
        assert (decode_image(file.getvalue()) == pixels).all()

        see_through = np.dstack([pixels, np.tile(np.arange(60, dtype=np.uint8), (40, 1))])
        assert (decode_image(encoded(see_through)) == pixels).all()

        grey = pixels[..., 0]
        assert (decode_image(encoded(grey)) == grey[..., None]).all()
        fine = grey.astype(np.uint16) * 256 + 77
        assert (decode_image(encoded(fine)) == grey[..., None]).all()

        file = io.BytesIO()
        frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
        assert (decode_image(file.getvalue()) == pixels).all()

    def test_bombs_do_not_go_off(self) -> None:
        """A small file whose colour profile or pixels would fill the memory."""
        header = struct.pack(">IIBBBBB", 4000, 4000, 8, 2, 0, 0, 0)
        whole = png(b"IHDR", header) + png(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 2**26, 9)) + png(b"IEND", b"")
        with pytest.raises(CodecError, match=r"not a whole.*too large"):
            decode_image(b"\x89PNG\r\n\x1a\n" + whole)
        huge = png(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)) + png(b"IDAT", b"")
        with pytest.raises(CodecError):
            decode_image(b"\x89PNG\r\n\x1a\n" + huge)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_colour_mode_becomes_rgb(self, mode: str) -> None:
        file = io.BytesIO()
        Image.fromarray(scene().image).convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
        assert decode_image(file.getvalue()).shape == scene().image.shape


def png(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
