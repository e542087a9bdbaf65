"""A response seen while it grows is the response; photographs go through ``infer`` at full size."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage
import tiny
from box_server import BoxServer, serving
from PIL import Image

from segzero_jax import asking, infer, rollout
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model import save_hf
from segzero_jax.model.policy import ForwardConfig
from segzero_jax.overlay import decode_mask
from segzero_jax.rollout import Sampling, sample, sample_in_parts

SIDE = 840


@pytest.mark.parametrize(("greedy", "room"), [(True, 256), (False, 256), (False, 3)])
def test_a_response_in_parts_is_the_response(greedy: bool, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token, whatever the parts and the cache's room; each part begins with the one before.

    Bit for bit, unless the two have other room at a token: keys are then summed up in another order.
    """
    monkeypatch.setattr(rollout, "_FIRST_ROOM", room)
    for program in (sample, rollout._begin_alone):
        program.clear_cache()
    processor = tiny.load_processor()
    sampling = Sampling(2, 11, (7,), processor.pad_id, processor.visual_ids, greedy=greedy)
    with jax.set_mesh(make_mesh("1x1")):
        policy, batch = tiny.random_policy(), tiny.prompts(2, processor)
        fwd, key = ForwardConfig(tiny.DIMS, TRAIN, jnp.dtype("float32")), jax.random.key(3)
        whole = jax.device_get(sample(policy, batch, key, fwd=fwd, sampling=sampling))
        parts = list(sample_in_parts(policy, batch, key, fwd=fwd, sampling=sampling, tokens=4))
    assert len(parts) == 3
    for name, value in whole._asdict().items():
        rounding = 1e-6 if name == "logps_bgr" and room == 3 else 0
        np.testing.assert_allclose(getattr(parts[-1], name), value, rtol=rounding, atol=0)
    for count, part in zip((4, 8, 11), parts, strict=True):
        np.testing.assert_array_equal(part.tokens_bgr[..., :count], whole.tokens_bgr[..., :count])
        assert (part.tokens_bgr[..., count:] == processor.pad_id).all()


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face directory with a random policy of two layers."""
    directory = tmp_path_factory.mktemp("babbler")
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(tiny.random_policy(), tiny.DIMS, directory, carry_from="toy")
    (directory / "config.json").write_text(json.dumps(tiny.hf_config()))
    return str(directory)


def test_photographs_at_full_size(babbler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs that scikit-image brings, 840 by 840 for the policy; a known box lands on the known pixels."""
    box = {"bbox_2d": [210, 84, 630, 420], "point_2d": [420, 252]}
    seen: list[tuple[int, str]] = []
    respond = asking.respond

    def says(loaded: asking.Loaded, example: object, *options: object) -> tuple[str, bool]:
        short = loaded.config.rollout.__class__(max_prompt_tokens=1300, max_response_tokens=2)
        changed = loaded.config.__class__(**{**vars(loaded.config), "rollout": short})
        text, finished = respond(asking.Loaded(**{**vars(loaded), "config": changed}), example, *options)
        prompt = loaded.processor.encode(example)
        seen.append((int((prompt.tokens_p == loaded.processor.image_id).sum()), text))
        return f"<think> there </think><answer>[{json.dumps(box)}]</answer>", finished

    monkeypatch.setattr("segzero_jax.answering.respond", says)
    folder = Path(skimage.__file__).parent / "data"
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for name in ("astronaut.png", "coffee.png"):
        (pictures / name).write_bytes((folder / name).read_bytes())
    with serving(BoxServer()) as address:
        arguments = ["--image", str(pictures), "--query", "the face", "--checkpoint", babbler, "--prompt=toy"]
        assert infer.main([*arguments, "--server", address, "--out", str(tmp_path / "out")]) == 0
    assert [tokens for tokens, _ in seen] == [900, 900]
    for name in ("astronaut", "coffee"):
        picture = np.asarray(Image.open(pictures / f"{name}.png").convert("RGB"))
        height, width = picture.shape[:2]
        row = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        x1, y1, x2, y2 = width / 4, height / 10, width * 3 / 4, height / 2
        assert (row["frame"], row["answer_frame"]) == ([width, height], [SIDE, SIDE])
        assert row["objects"][0]["box"] == pytest.approx([x1, y1, x2, y2])
        mask = np.asarray(Image.open(tmp_path / "out" / f"{name}_mask.png")) == 255
        inside = np.zeros((height, width), bool)
        inside[round(y1) : round(y2), round(x1) : round(x2)] = True
        np.testing.assert_array_equal(mask, inside)
        np.testing.assert_array_equal(decode_mask(row["mask"]), inside)
        overlay = np.asarray(Image.open(tmp_path / "out" / f"{name}_overlay.png"))
        assert overlay.shape == picture.shape
        changed = np.abs(overlay.astype(int) - picture).max(-1) > 40
        rows, columns = np.flatnonzero(changed.mean(1) > 0.3), np.flatnonzero(changed.mean(0) > 0.3)
        edges = (rows[0], rows[-1], columns[0], columns[-1])
        assert edges == pytest.approx((y1, y2, x1, x2), abs=6), "the box and the veil are drawn where they are"
