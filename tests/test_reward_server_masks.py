"""Masks are the plain SAM2ImagePredictor's, whatever is computed together; models come from where they are said to."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from sam_calls import PIXELS_APART, SCORE_APART, plain_mask, prompts_of, scene, scene_with

from reward_server.segmenter import TOY, ModelError, Prompt, Segmenter
from segzero_jax.data.scenes import make_example_scene


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.set_num_threads(1)
    return Segmenter.load("toy", "cpu")


def masks_of(segmenter: Segmenter, image: np.ndarray, prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    decoded = segmenter.decode(segmenter.embed([image])[0], prompts)
    return segmenter.masks(decoded.logits, *image.shape[:2]).numpy(), decoded.scores


@contextlib.contextmanager
def scored(segmenter: Segmenter, scores: tuple[float, ...]) -> Iterator[None]:
    """Within it the mask decoder gives its masks, and these scores of the three for every prompt."""

    def rated(module: object, arguments: object, found: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        masks, own, *rest = found
        return (masks, torch.tensor(scores).expand_as(own), *rest)

    handle = segmenter.model.sam_mask_decoder.register_forward_hook(rated)
    try:
        yield
    finally:
        handle.remove()


class TestMasks:
    @pytest.mark.parametrize("points", [0, 1, 2])
    def test_equal_the_plain_predictors_box_by_box(self, segmenter: Segmenter, points: int) -> None:
        compared = 0
        pictures = [scene(index) for index in range(4)]
        embeddings = segmenter.embed([picture.image for picture in pictures])
        for picture, embedding in zip(pictures, embeddings, strict=True):
            prompts = [p for shift in (0.0, 4.7, -11.3) for p in prompts_of(picture, points, shift)]
            decoded = segmenter.decode(embedding, prompts)
            masks = segmenter.masks(decoded.logits, *picture.image.shape[:2]).numpy()
            segmenter.predictor.set_image(picture.image)
            for mask, score, prompt in zip(masks, decoded.scores, prompts, strict=True):
                expected, expected_score = plain_mask(segmenter, prompt)
                assert (mask != expected).sum() <= PIXELS_APART
                assert score == pytest.approx(expected_score, abs=SCORE_APART)
                compared += 1
        assert compared >= 12

    def test_equal_the_plain_predictors_on_pictures_of_several_sizes(self, segmenter: Segmenter) -> None:
        draws = np.random.default_rng(0)
        pictures = [draws.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 500), (300, 31), (1, 1))]
        for picture, embedding in zip(pictures, segmenter.embed(pictures), strict=True):
            height, width = picture.shape[:2]
            prompt = Prompt((0.1 * width, 0.2 * height, 0.8 * width, 0.9 * height), ((0.5 * width, 0.5 * height),))
            mask = segmenter.masks(segmenter.decode(embedding, [prompt]).logits, height, width)[0].numpy()
            segmenter.predictor.set_image(picture)
            expected, _ = plain_mask(segmenter, prompt)
            assert mask.shape == expected.shape == (height, width)
            assert (mask != expected).sum() <= PIXELS_APART

    def test_do_not_depend_on_neighbours_with_other_point_counts(self, segmenter: Segmenter) -> None:
        image = scene().image
        mixed = [prompts_of(scene(), points)[0] for points in (0, 1, 2, 1, 0)]
        together, scores = masks_of(segmenter, image, mixed)
        for i, prompt in enumerate(mixed):
            alone, score = masks_of(segmenter, image, [prompt])
            assert (together[i] != alone[0]).sum() <= PIXELS_APART
            assert scores[i] == pytest.approx(score[0], abs=SCORE_APART)

    def test_do_not_depend_on_pictures_encoded_beside_them(self, segmenter: Segmenter) -> None:
        images = [scene(index).image for index in range(5)]
        together = segmenter.embed(images)
        for image, embedding in zip(images, together, strict=True):
            (alone,) = segmenter.embed([image])
            for ours, expected in zip(embedding.levels, alone.levels, strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
            # Its own memory, so that forgetting it frees it.
            assert all(level.untyped_storage().nbytes() == level.nbytes for level in embedding.levels)

    @pytest.mark.parametrize(
        ("given", "chosen"),
        [((0.5, 0.5, 0.5), 2), ((0.7, 0.7, 0.5), 1), ((0.7, 0.5, 0.7), 2), ((0.7, 0.5, 0.6), 0)],
        ids=["all equal", "the first two", "the outer two", "none"],
    )
    def test_are_the_last_of_those_with_the_highest_score(
        self, segmenter: Segmenter, given: tuple[float, ...], chosen: int
    ) -> None:
        """As Seg-Zero's evaluation takes the predictor's: scores in bfloat16 are often equal."""
        picture = scene()
        (prompt, *_) = prompts_of(picture)
        with scored(segmenter, given):
            segmenter.predictor.set_image(picture.image)
            _, scores, logits = segmenter.predictor.predict(
                point_coords=np.array(prompt.points), point_labels=np.ones(1), box=np.array(prompt.box)
            )
            assert np.argsort(scores, kind="stable")[::-1][0] == chosen
            decoded = segmenter.decode(segmenter.embed([picture.image])[0], [prompt])
        assert decoded.scores == pytest.approx(max(given))
        apart = [np.abs(decoded.logits[0, 0].clamp(-32, 32).numpy() - its).max() for its in logits]
        assert [off < 1e-3 for off in apart] == [place == chosen for place in range(3)]

    @pytest.mark.parametrize("given", [(np.nan, 0.5, 0.5), (0.9, np.nan, 0.5), (np.nan,) * 3])
    def test_keep_a_score_that_is_no_number(self, segmenter: Segmenter, given: tuple[float, ...]) -> None:
        with scored(segmenter, given):
            _, scores = masks_of(segmenter, scene().image, prompts_of(scene())[:1])
        assert np.isnan(scores).all()

    def test_take_one_decoder_call_for_equally_many_points(self, segmenter: Segmenter) -> None:
        batches = []
        handle = segmenter.model.sam_mask_decoder.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(len(kwargs["sparse_prompt_embeddings"])), with_kwargs=True
        )
        (embedding,), prompt = segmenter.embed([scene().image]), prompts_of(scene())[0]
        try:
            whole = segmenter.decode(embedding, [prompt] * 16)
            assert batches == [16]
            # Past the bound on memory the call is cut, and nothing else changes.
            parts = segmenter.decode(embedding, [prompt] * 16, prompts_per_call=5)
        finally:
            handle.remove()
        assert batches == [16, 5, 5, 5, 1]
        torch.testing.assert_close(whole.logits, parts.logits, atol=1e-4, rtol=1e-4)


class TestCompiled:
    def test_encoders_see_powers_of_two_and_give_what_was_asked(
        self, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With torch.compile stood in for by a recorder: compiling takes a minute."""
        sizes = []

        def record(forward: object, dynamic: bool) -> object:
            assert dynamic is False
            return lambda pixels: sizes.append(len(pixels)) or forward(pixels)

        monkeypatch.setattr(torch, "compile", record)
        compiled = Segmenter.load("toy", "cpu", compiled=True)
        images = [scene(index).image for index in range(5)]
        together = compiled.embed(images)
        assert len(together) == 5
        assert sizes == [8]
        compiled.embed(images[:1])
        compiled.embed(images[:2])
        assert sizes == [8, 1, 2]
        for ours, expected in zip(together, segmenter.embed(images), strict=True):
            for a, b in zip(ours.levels, expected.levels, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class TestToyModel:
    def test_finds_objects_it_has_not_seen_and_follows_the_box(self, segmenter: Segmenter) -> None:
        exact, near, far = [], [], []
        for index in range(25):
            picture, question = make_example_scene("val", index)
            item = picture.objects[question.answer]
            side = (item.box[2] - item.box[0]) / 2
            segmenter.predictor.set_image(picture.image)
            for ious, shift in ((exact, 0.0), (near, 0.1 * side), (far, 1.2 * side)):
                prompt = prompts_of(picture, 1, shift)[question.answer]
                found, _ = plain_mask(segmenter, Prompt(prompt.box, ((float(item.point[0]), float(item.point[1])),)))
                ious.append((found & item.mask).sum() / (found | item.mask).sum())
        assert np.mean(exact) >= 0.80
        assert np.mean(near) >= 0.75
        assert np.mean(far) <= np.mean(exact) - 0.2

    def test_ships_small(self) -> None:
        assert sum(path.stat().st_size for path in TOY.iterdir()) < 4 * 2**20


class TestLoading:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        """The toy model in the form that SAM 2's authors publish."""
        weights = {name: value.float() for name, value in load_file(TOY / "model.safetensors").items()}
        torch.save({"model": weights}, tmp_path / "mine.pt")
        return tmp_path / "mine.pt"

    def test_reads_a_checkpoint_file_with_its_configuration(self, segmenter: Segmenter, checkpoint: Path) -> None:
        loaded = Segmenter.load(str(checkpoint), "cpu", str(TOY / "config.yaml"))
        assert loaded.name == str(checkpoint)
        assert loaded.checkpoint_sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        picture = scene_with(2)
        ours, scores = masks_of(loaded, picture.image, prompts_of(picture))
        expected, expected_scores = masks_of(segmenter, picture.image, prompts_of(picture))
        assert (ours == expected).all()
        assert (scores == expected_scores).all()

    def test_knows_published_file_names_and_configurations(self, checkpoint: Path) -> None:
        """Their configurations are found, and the toy's weights do not fit them."""
        published = checkpoint.rename(checkpoint.parent / "sam2.1_hiera_tiny.pt")
        with pytest.raises(ModelError, match=r"no weights for sam2\.1_hiera_t\.yaml"):
            Segmenter.load(str(published), "cpu")
        with pytest.raises(ModelError, match=r"no weights for sam2_hiera_s\.yaml"):
            Segmenter.load(str(published), "cpu", "configs/sam2/sam2_hiera_s.yaml")

    def test_refuses_what_it_cannot_load(self, tmp_path: Path, checkpoint: Path) -> None:
        broken = tmp_path / "broken.pt"
        broken.write_bytes(checkpoint.read_bytes()[:1000])
        bare = tmp_path / "bare.pt"
        torch.save({"weights": 1}, bare)
        page, empty, nothing, odd = (tmp_path / f"{name}.pt" for name in ("page", "empty", "nothing", "odd"))
        page.write_text("<html>Sign in</html>")
        empty.touch()
        torch.save({"model": None}, nothing)
        torch.save({"model": {"a": 1}}, odd)
        toy_config = str(TOY / "config.yaml")
        cases = [
            (("facebook/sam3",), r"'facebook/sam3'.*expected toy"),
            ((str(tmp_path),), r"has no config\.yaml"),
            ((str(checkpoint),), r"mine\.pt': give its --config, expected a YAML file or a name such as configs/sam2"),
            ((str(checkpoint), "cpu", "nowhere.yaml"), r"config 'nowhere\.yaml': no such file"),
            (("toy", "cpu", toy_config), r"only a checkpoint file needs one, model 'toy' is none"),
            (("toy", "cuda:7"), r"device 'cuda:7': expected auto, cpu or a GPU"),
            ((str(broken), "cpu", toy_config), r"broken\.pt: no weights for config\.yaml"),
            ((str(bare), "cpu", toy_config), r"bare\.pt: has no entry 'model'"),
            ((str(page), "cpu", toy_config), r"page\.pt: 20 bytes, not a PyTorch checkpoint"),
            ((str(empty), "cpu", toy_config), r"empty\.pt: 0 bytes, not a PyTorch checkpoint"),
            ((str(nothing), "cpu", toy_config), r"nothing\.pt: no weights for config\.yaml"),
            ((str(odd), "cpu", toy_config), r"odd\.pt: no weights for config\.yaml"),
            ((toy_config, "cpu", str(checkpoint)), r"mine\.pt: not the configuration of a SAM 2"),
        ]
        for arguments, reason in cases:
            with pytest.raises(ModelError, match=reason) as refused:
                Segmenter.load(*arguments)
            assert "\n" not in str(refused.value)

    def test_refuses_weights_of_another_shape(self, tmp_path: Path) -> None:
        config = OmegaConf.load(TOY / "config.yaml")
        config.model.image_encoder.trunk.stages = [1, 1, 3, 1]
        OmegaConf.save(config, tmp_path / "config.yaml")
        (tmp_path / "model.safetensors").write_bytes((TOY / "model.safetensors").read_bytes())
        with pytest.raises(ModelError, match=r"model\.safetensors: no weights for config\.yaml") as refused:
            Segmenter.load(str(tmp_path), "cpu")
        assert "\n" not in str(refused.value)
