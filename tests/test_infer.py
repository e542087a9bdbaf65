"""The infer command: a picture and a question in, reasoning, box and mask out; bad input is one line."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from authority import Authority
from box_server import FRAME, PICTURE, QUESTION, SCENE, BoxServer, encoded, rotated, serving
from PIL import Image

from reward_server import reward_pb2
from reward_server.codec import decode_image
from segzero_jax import asking, infer, options
from segzero_jax import config as configs
from segzero_jax.answering import Answered, Picture
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config
from segzero_jax.frames import rescale_object
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh
from segzero_jax.model import load_hf, save_hf
from segzero_jax.overlay import decode_mask
from segzero_jax.processor import Processor, settings_directory
from segzero_jax.prompt import parse_answer
from segzero_jax.rollout import Sampling
from segzero_jax.segmenting import Found
from segzero_jax.types import Frame, Rollout

SIDE = 112
TORCH = {"torch", "torchvision", "sam2", "transformers", "tensorflow"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    path.write_bytes(encoded(PICTURE))
    return path


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face directory with a tiny policy that has learnt nothing."""
    directory = tmp_path_factory.mktemp("babbler")
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(tiny.random_policy(), tiny.DIMS, directory, carry_from="toy")
    (directory / "config.json").write_text(json.dumps(tiny.hf_config()))
    return str(directory)


def ask(image: Path, *more: str, query: str = QUESTION, checkpoint: str = "toy") -> dict[str, Any]:
    """Runs the command in this process; returns the JSON."""
    out = image.parent / "out"
    arguments = ["--image", str(image), "--query", query, "--checkpoint", checkpoint, "--out", str(out)]
    assert infer.main([*arguments, *more]) == 0
    return json.loads((out / f"{image.stem}.json").read_text())


def mask_file(image: Path) -> np.ndarray:
    picture = Image.open(image.parent / "out" / f"{image.stem}_mask.png")
    assert picture.mode == "L"
    return np.asarray(picture)


def test_the_shipped_policy_and_sam_find_an_object(image: Path) -> None:
    """The command as a user types it, in a fresh process and an empty directory."""
    program = (
        "import sys; from segzero_jax.infer import main; code = main(sys.argv[1:]); "
        f"assert not {TORCH!r} & set(sys.modules); sys.exit(code)"
    )
    arguments = ["--image", "scene.png", "--query", QUESTION]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=image.parent, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    folder = image.parent / "infer"
    names = ("scene_overlay.png", "scene_mask.png", "scene.json")
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    first, thinking, answer, mask_line, wrote = done.stdout.splitlines()
    assert first.startswith("policy: toy (the default")
    assert wrote == "wrote " + ", ".join(f"infer/{name}" for name in names)

    row = json.loads((folder / "scene.json").read_text())
    assert thinking == f"thinking: {row['thinking'].strip()}"
    assert (row["question"], row["checkpoint"], row["sam"]) == (QUESTION, "toy", "toy")
    assert row["frame"] == [FRAME.width, FRAME.height]
    (obj,) = (rescale_object(obj, Frame(SIDE, SIDE), FRAME) for obj in parse_answer(row["text"]).objects)
    assert row["objects"] == [{"box": list(obj.box), "points": [list(point) for point in obj.points]}]
    assert f"{obj.box[0]:.6g}, {obj.box[1]:.6g}" in answer

    mask = decode_mask(row["mask"])
    target = SCENE.objects[0].mask
    assert (mask & target).sum() / (mask | target).sum() > 0.5
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "scene_mask.png")), mask * np.uint8(255))
    assert mask_line.startswith(f"mask: {mask.sum()} of {mask.size} pixels, SAM 2 (toy) expects an IoU of 0.")
    overlay = Image.open(folder / "scene_overlay.png")
    assert (overlay.mode, overlay.size) == ("RGB", PICTURE.size)
    changed = differing(folder / "scene_overlay.png")
    assert changed[mask].mean() > 10 * changed[~mask].mean()


def test_policy_and_server_agree_on_the_picture(image: Path) -> None:
    """Stored upright, rotated or with transparency: one picture, one answer, one mask."""
    server = BoxServer()
    with serving(server) as address:
        upright = ask(image, "--server", address)
        assert server.seen[0].image.data == image.read_bytes()
        assert (server.seen[0].frame.width, server.seen[0].frame.height) == PICTURE.size
        mask = mask_file(image)
        (obj,) = upright["objects"]
        x1, y1, x2, y2 = (round(v) for v in obj["box"])
        assert set(np.unique(mask)) == {0, 255}
        assert mask[y1:y2, x1:x2].all()
        assert mask.sum() == 255 * (x2 - x1) * (y2 - y1)
        assert (upright["sam"], upright["model_score"]) == ("boxes", 0.5)

        transparent = PICTURE.convert("RGBA")
        transparent.putalpha(Image.fromarray(np.where(SCENE.objects[0].mask, 0, 255).astype(np.uint8)))
        for data, same in ((rotated("PNG"), True), (encoded(transparent), False)):
            image.write_bytes(data)
            row = ask(image, "--server", address)
            seen = decode_image(server.seen[-1].image.data)
            assert (row["frame"], row["mask"]["width"]) == ([FRAME.width, FRAME.height], FRAME.width)
            if same:
                np.testing.assert_array_equal(seen, SCENE.image)
                np.testing.assert_array_equal(mask_file(image), mask)
                assert row == upright
            else:
                assert (seen[SCENE.objects[0].mask] == 255).all(), "transparency is white for the policy"


def test_a_picture_larger_than_sam_takes_is_answered_in_its_own_pixels(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(BoxServer()) as address:
        whole = ask(image, "--server", address)
        assert "SAM 2 saw" not in capsys.readouterr().out
    with serving(BoxServer(pixels=12_000)) as address:
        row = ask(image, "--server", address)
    said = "SAM 2 saw the picture at 97x122, as its server takes none larger; objects and mask are in pixels of its own"
    assert f"{said} {FRAME.width}x{FRAME.height}\n" in capsys.readouterr().out
    assert (whole["sam_frame"], row["sam_frame"]) == ([FRAME.width, FRAME.height], [97, 122])
    assert (row["objects"], row["frame"]) == (whole["objects"], whole["frame"])
    mask, wanted = decode_mask(row["mask"]), decode_mask(whole["mask"])
    assert (mask & wanted).sum() > 0.9 * (mask | wanted).sum()
    np.testing.assert_array_equal(mask_file(image), mask * np.uint8(255))


def test_a_drawn_answer_follows_its_seed_and_may_be_malformed(
    image: Path, babbler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run in half precision, on two devices; no server is started, as there is nothing to ask it."""
    changes = {"rollout.max_response_tokens": 12, "model.path": babbler, "model.compute_dtype": "bfloat16"}
    run = save_run(image.parent / "run", configs.replace(Config(), **changes), 3)
    asked = ("--sample", "--mesh=1x2", "--server=local")
    first = ask(image, *asked, checkpoint=run)
    printed = capsys.readouterr().out
    assert "answer: malformed (cut at 12 tokens), there is nothing to segment; the policy said: " in printed
    assert not {chr(code) for code in range(32)} & set(printed) - {"\n"}
    assert (first["readable"], first["objects"], first["sam"]) == (False, [], "")
    assert (first["checkpoint"], first["answer_frame"]) == (f"{run}/checkpoints/3", [112, 112])
    # What could not be read does not say that there is nothing.
    assert first["mask"] is None
    assert "mask: none, the answer could not be read" in printed
    assert sorted(path.name for path in (image.parent / "out").iterdir()) == ["scene.json", "scene_overlay.png"]
    assert differing(image.parent / "out/scene_overlay.png").mean() < 0.01
    assert ask(image, *asked, "--seed=0", checkpoint=run)["text"] == first["text"]
    assert ask(image, *asked, "--seed=1", checkpoint=run)["text"] != first["text"]
    with jax.set_mesh(make_mesh("1x1")):
        weights = jax.tree.leaves(asking.load(run).policy)
    assert {leaf.dtype for leaf in weights} == {jnp.dtype("bfloat16")}, "half the room"


def test_options_reach_the_sampler_and_any_answer_is_understood(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Sampling] = []
    processor = Processor.load("toy", SIDE, "toy", 64)

    def says(text: str, finished: bool = True) -> None:
        def parts(
            policy: object, batch: object, key: object, *, fwd: object, sampling: Sampling, tokens: int
        ) -> Iterator[Rollout]:
            asked.append(sampling)
            ids = np.array([[[*processor.encode_text(text), 0]]])
            for length in range(1, ids.size):
                yield Rollout(ids, np.array([[length]]), np.zeros(ids.shape), np.array([[finished]]))

        monkeypatch.setattr(asking, "sample_in_parts", parts)

    says("<think>no 猫 here</think><answer>[]</answer>")
    row = ask(image)
    assert (row["thinking"], row["readable"], row["objects"]) == ("no 猫 here", True, [])
    assert not mask_file(image).any()
    printed = capsys.readouterr().out
    # A character of several tokens is printed once it is whole.
    assert "thinking: no 猫 here\nanswer: no such object in the picture\nmask: 0 of " in printed

    says('<answer>{"bbox": [28,14,84,56], "points_1": [56,28], "points_2": [1e5,0]}</answer>', finished=False)
    row = ask(image, "--sample", "--temperature=0.5", "--server=none")
    w, h = FRAME.width / 4, FRAME.height / 8
    (obj,) = row["objects"]
    assert obj["box"] == pytest.approx([w, h, 3 * w, 4 * h])
    assert obj["points"][0] == pytest.approx([2 * w, 2 * h])
    assert len(obj["points"]) == 2
    assert row["thinking"] is None

    assert [(sampling.greedy, sampling.group) for sampling in asked] == [(True, 1), (False, 1)]
    assert asked[1].temperature == 0.5
    assert asked[1].max_tokens == Config().rollout.max_response_tokens
    assert set(asked[1].banned_ids) == set(processor.visual_ids)


def test_several_pictures_and_questions(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, a question on the command line and more in a file; reasoning is printed while it grows, once."""
    processor = Processor.load("toy", SIDE, "toy", 64)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.PNG", "b.png", "b.jpg"):
        (folder / name).write_bytes(encoded(PICTURE, "JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.png").write_bytes(b"Mac OS X")
    for name in ("d.tif", "c.BMP"):
        (folder / name).write_bytes(b"a picture of another kind")
    (tmp_path / "more.txt").write_text("the square\n\nthe star\n")
    said = ["<think> it", "<think> it is</th", "<think> it is here </think><answer>[]</answer>"]

    def parts(*_: object, fwd: object, sampling: Sampling, tokens: int) -> Iterator[Rollout]:
        for text in said:
            ids = np.array([[processor.encode_text(text)]])
            yield Rollout(ids, np.array([[ids.size]]), np.zeros(ids.shape), np.array([[text is said[-1]]]))

    monkeypatch.setattr(asking, "sample_in_parts", parts)
    out = tmp_path / "out"
    arguments = ["--image", str(folder), "--query", "the circle", "--queries", str(tmp_path / "more.txt")]
    assert infer.main([*arguments, "--checkpoint=toy", "--server=none", f"--out={out}"]) == 0
    stems = [f"{picture}_{n}" for picture in ("a", "b-jpg", "b-png") for n in (1, 2, 3)]
    assert sorted(path.stem for path in out.glob("*.json")) == stems
    assert json.loads((out / "b-jpg_3.json").read_text())["question"] == "the star"
    printed = capsys.readouterr().out
    assert "skipped 2 images that are not PNG, JPEG or WebP, such as c.BMP\n" in printed
    assert printed.count("thinking: it is here\n") == 9
    asked = [line for line in printed.splitlines() if line.startswith(f"{folder}/")]
    questions = ("the circle", "the square", "the star")
    assert asked == [f"{folder}/{name}: {each}" for name in ("a.PNG", "b.jpg", "b.png") for each in questions]

    (tmp_path / "more.txt").write_text(" \n")
    nothing = ["--image", str(folder), "--queries", str(tmp_path / "more.txt"), "--out", str(tmp_path / "new")]
    refused(capsys, nothing, "more.txt: no question in it")
    refused(capsys, ["--image", str(folder), "--out", str(tmp_path / "new")], "no question, expected --query")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png"], ["a-jpg", "a-png"]),
        (["a-png.png", "a.jpg", "a.png"], ["a-png", "a-jpg", "a-png-2"]),
        (["a-png-2.png", "a-png.png", "a.jpg", "a.png"], ["a-png-2", "a-png", "a-jpg", "a-png-3"]),
    ],
)
def test_the_files_of_no_picture_take_the_place_of_another_s(names: list[str], expected: list[str]) -> None:
    assert infer.stems([Path("folder") / name for name in names]) == expected


def test_a_file_of_questions_is_read_line_by_line(tmp_path: Path) -> None:
    """With the mark that Windows puts in front, its ends of lines, and a separator that is part of a question."""
    file = tmp_path / "questions.txt"
    file.write_bytes("\ufeffthe dog\r\nthe cat\u2028on the mat\n\n.\n\t the mouse ".encode())
    assert infer.find_questions(["first"], file) == ["first", "the dog", "the cat\u2028on the mat", "the mouse"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pictures that are asked about, by a policy that takes no time and a SAM 2 that refuses "the last"."""
    pictures: list[bytes] = []
    text = "<answer>[]</answer>"

    def answer(_: object, picture: Picture, question: str, *more: object) -> Answered:
        pictures.append(picture.stored)
        mask = None if question == "the last" else np.ones((picture.frame.height, picture.frame.width), bool)
        return Answered(picture, question, text, parse_answer(text), True, SIDE, (), Found(None), mask)

    processor = Processor.load("toy", SIDE, "toy", 64)
    monkeypatch.setattr(infer, "load", lambda *_: SimpleNamespace(processor=processor, config=Config()))
    monkeypatch.setattr(infer, "answer_question", answer)
    return pictures


def test_no_mask_of_an_earlier_answer_stays(image: Path, shown: list[bytes]) -> None:
    ask(image, "--server=none")
    assert mask_file(image).all()
    ask(image, "--server=none", query="the last")
    assert sorted(path.name for path in (image.parent / "out").iterdir()) == ["scene.json", "scene_overlay.png"]


@pytest.mark.parametrize(("option", "loads"), [((), "org/small"), (("--sam=org/large",), "org/large")])
def test_sam_is_the_runs_unless_another_is_asked_for(
    image: Path, shown: list[bytes], option: tuple[str, ...], loads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.replace(Config(), **{"reward.local_model": "org/small"})
    loaded = SimpleNamespace(processor=Processor.load("toy", SIDE, "toy", 64), config=config)
    monkeypatch.setattr(infer, "load", lambda *_: loaded)
    asked: list[str] = []
    monkeypatch.setattr(infer, "Segmenter", lambda _server, _access, sam, _say: nullcontext(asked.append(sam())))
    ask(image, *option)
    assert asked == [loads]


def test_files_may_go_to_the_home_folder(image: Path, shown: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(image.parent / "home"))
    monkeypatch.chdir(image.parent)
    arguments = ["--image=scene.png", "--query=x", "--checkpoint=toy", "--server=none", "--out=~/answers"]
    assert infer.main(arguments) == 0
    assert (image.parent / "home/answers/scene.json").is_file()


def test_questions_that_are_too_long_are_told_before_the_first_is_asked(
    image: Path, shown: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    image.with_name("more.txt").write_text("the red circle\n" + "the red circle " * 30)
    arguments = ["--image", str(image), "--query=the star", "--queries", str(image.with_name("more.txt"))]
    arguments += ["--checkpoint=toy", "--server=none", "--out", str(image.parent / "out")]
    refused(capsys, arguments, "question 3 of 3, 'the red circle the", "expected at most max_prompt_tokens=64")
    assert shown == []
    (longest,) = Processor.load("toy", SIDE, "toy", 64).count_tokens(["the star"]).tolist()
    infer.check_lengths(["the star"], Processor.load("toy", SIDE, "toy", longest))


def test_a_picture_that_can_be_read_only_once_is_read_once(image: Path, shown: list[bytes]) -> None:
    small = encoded(PICTURE.resize((30, 20)))  # less than a pipe holds
    reader, writer = os.pipe()
    os.write(writer, small)
    os.close(writer)
    arguments = ["--image", f"/dev/fd/{reader}", "--query=x", "--checkpoint=toy", "--server=none"]
    assert infer.main([*arguments, "--out", str(image.parent / "out")]) == 0
    os.close(reader)
    assert shown == [small]
    assert image.parent.joinpath("out", f"{reader}_overlay.png").exists()


def test_a_name_that_is_too_long_for_its_files_is_told_before_the_first_is_asked(
    image: Path, shown: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    image.with_name("é" * 122 + ".png").write_bytes(image.read_bytes())
    arguments = ["--image", str(image.parent), "--query=x", "--checkpoint=toy", "--server=none"]
    refused(capsys, [*arguments, "--out", str(image.parent / "out")], "bytes too long for STEM_overlay.png; rename")
    assert shown == []


def test_space_around_a_question_is_no_part_of_it(image: Path) -> None:
    row = ask(image, "--server=none", query=f" {QUESTION}.\t")
    assert row["question"] == f"{QUESTION}."
    assert row["text"] == ask(image, "--server=none")["text"]


def test_a_port_that_is_taken_is_told_before_the_policy_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infer, "load", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--demo", "--checkpoint=toy", f"--port={port}", "--out", str(tmp_path / "out")]
        refused(capsys, arguments, f"--port={port}: taken; choose another")


def differing(path: Path) -> np.ndarray:
    """bool [h, w]: where a drawing shows on the picture, which drawing softens a little."""
    return np.abs(np.asarray(Image.open(path), int) - SCENE.image).max(-1) > 48


def save_run(run: Path, config: Config, *steps: int) -> str:
    """A run directory with the weights of ``model.path`` as these steps; returns where it is."""
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(run / "checkpoints", len(steps)) as checkpoints:
        policy, _ = load_hf(config.model.path)
        for step in steps:
            checkpoints.save(step, TrainState(policy, (), jnp.int32(step)), {}, config, Identity("", None))
        checkpoints.wait()
    return str(run)


def test_without_a_server_there_is_no_mask(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = ask(image, "--reward.server", "none")
    assert row["objects"]
    assert (row["mask"], row["model_score"]) == (None, 0)
    assert sorted(path.name for path in (image.parent / "out").iterdir()) == ["scene.json", "scene_overlay.png"]
    assert "mask: none was asked for" in capsys.readouterr().out


def test_the_newest_checkpoint_of_the_toy_run_is_the_default(
    image: Path, babbler: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(image.parent)
    assert asking.find_checkpoint(None) == "toy"
    config = configs.replace(Config(), **{"rollout.max_response_tokens": 12, "model.path": babbler})
    save_run(Path("runs/toy"), config, 9, 10)
    assert infer.main(["--image", "scene.png", "--query", QUESTION]) == 0
    assert "policy: runs/toy/checkpoints/10 (the default" in capsys.readouterr().out
    assert json.loads(Path("infer/scene.json").read_text())["checkpoint"] == "runs/toy/checkpoints/10"
    assert asking.find_checkpoint("runs/toy") == "runs/toy/checkpoints/10"
    assert asking.find_checkpoint("runs/toy/checkpoints/9") == "runs/toy/checkpoints/9"

    Path("runs/toy/checkpoints/11").mkdir()
    assert asking.find_checkpoint(None) == "runs/toy/checkpoints/10", "nothing was saved as step 11"
    for step, why in ((8, ": no complete checkpoint there"), (11, "")):
        asked = f"runs/toy/checkpoints/{step}"
        arguments = ["--image", "scene.png", "--query", "x", "--out", "new", "--checkpoint", asked]
        refused(capsys, arguments, asked + why)


def test_a_hugging_face_directory_is_asked_as_told(babbler: str, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh("1x1")):
        loaded = asking.load(babbler)
        config = loaded.config
        other = asking.load(babbler, image_size=112, prompt="seg_zero")
        larger = asking.load("toy", image_size=140).config
        named = tmp_path / "link"
        named.symlink_to(babbler)
        assert asking.load(str(named)).config.data.prompt == "vision_reasoner"
    assert (other.config.reward.recipe, config.reward.recipe) == ("seg_zero_strict", "vision_reasoner")
    assert (config.data.image_size, config.data.prompt) == (840, "vision_reasoner")
    assert loaded.processor.resampling is Image.Resampling.BILINEAR, "as the released evaluations squash"
    assert (config.rollout.max_prompt_tokens, config.rollout.max_response_tokens) == (1300, 2000)
    assert config.model.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.policy)} == {jnp.dtype("bfloat16")}
    assert (other.processor.image_size, other.config.data.prompt) == (112, "seg_zero")
    assert asking.default_sam(config) == "facebook/sam2.1-hiera-large"
    assert asking.default_sam(larger) == "toy"
    earlier = {"model.path": "org/name", "reward.server": "local", "reward.local_model": "toy"}
    assert asking.default_sam(configs.replace(Config(), **earlier)) == "toy"
    photographs = configs.replace(Config(), **earlier, **{"data.name": "mugs"})
    assert asking.default_sam(photographs) == "facebook/sam2.1-hiera-large"
    assert larger.rollout.max_prompt_tokens == Config().rollout.max_prompt_tokens + 25 - 16, "the question has its room"


@pytest.mark.parametrize(
    ("path", "recipe"),
    [
        ("Seg-Zero-3B", "seg_zero_strict"),
        ("Seg_Zero_7B", "seg_zero_strict"),
        ("models--Ricky06662--Seg-Zero-7B/snapshots/9a1c3b", "seg_zero_strict"),
        ("models--Ricky06662--VisionReasoner-7B/snapshots/9a1c3b", "vision_reasoner"),
        ("models--segzero--VisionReasoner-7B/snapshots/9a1c3b", "vision_reasoner"),
        ("seg-zero/VisionReasoner-7B", "vision_reasoner"),
    ],
)
def test_a_released_checkpoint_is_asked_and_scored_as_its_name_says(
    babbler: str, tmp_path: Path, path: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / path
    named.mkdir(parents=True)
    for file in Path(babbler).iterdir():
        (named / file.name).symlink_to(file)
    monkeypatch.chdir(named)
    (tmp_path / "link").symlink_to(named)
    wording = "seg_zero" if recipe == "seg_zero_strict" else recipe
    with jax.set_mesh(make_mesh("1x1")):
        for given in (named, ".", tmp_path / "link"):
            config = asking.load(str(given)).config
            assert (config.data.prompt, config.reward.recipe) == (wording, recipe)
            own = asking.load(str(given), prompt="Box {question}.").config
            assert (own.data.prompt, own.reward.recipe) == ("Box {question}.", recipe)
            assert config.reward.mask_iou_weight == 0, "the papers score text alone"
        listed = asking.load(str(named), prompt="vision_reasoner").config
        assert listed.reward.recipe == "vision_reasoner", "the answers that it asks for"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """The command ends with 2 and one line that has these parts, and makes no directory for its output."""
    capsys.readouterr()
    try:
        code = infer.main(arguments)
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr().err
    assert code == 2, printed
    assert printed.startswith("python -m segzero_jax.infer: ")
    assert printed.count("\n") == 1
    for part in parts:
        assert part in printed
    out = Path(arguments[arguments.index("--out") + 1])
    assert not out.is_dir()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"--image": "absent.png"}, ("absent.png: no such file",)),
        ({"--checkpoint": "nobody/nothing"}, ("nobody/nothing", "hub")),
        ({"--image": "hollow"}, ("--image=hollow: no picture in this folder",)),
        ({"--demo": None}, ("--demo asks on its page",)),
        ({"--image": "text.png"}, ("text.png: image cannot be read",)),
        ({"--image": "empty.png"}, ("empty.png: no image, expected",)),
        ({"--image": "cut.png"}, ("cut.png: image cannot be read",)),
        ({"--query": " . "}, ("--query: expected a question",)),
        ({"--queries": "hollow"}, ("--queries=hollow: Is a directory, expected a file",)),
        ({"--queries": "absent.txt"}, ("--queries=absent.txt: No such file",)),
        ({"--query": "the \udcff"}, ("--query: expected UTF-8",)),
        ({"--query": "the red circle " * 30}, ("question 1 of 1, 'the red circle the", "max_prompt_tokens=64")),
        ({"--checkpoint": "absent"}, ("absent: expected a run directory", "'toy'")),
        ({"--checkpoint": "damaged"}, ("damaged", "cut short")),
        ({"--image-size": "100"}, ("data.image_size=100", "multiple of 28")),
        ({"--prompt": "poem"}, ("--prompt: poem: expected toy", "vision_reasoner or a text with {question}")),
        ({"--out": "taken"}, ("--out=taken: is a file",)),
        ({"--out": "taken/a/b", "--image": "absent.png"}, ("--out=taken/a/b: ", "/taken is a file, expected a folder")),
        ({"--port": "99999"}, ("--port: 99999: expected 1 to 65535",)),
        ({"--port": "0"}, ("--port: 0: expected 1 to 65535",)),
        ({"--server": "nowhere"}, ("'nowhere': expected host:port",)),
        ({"--server": "127.0.0.1:1"}, ("127.0.0.1:1: unreachable", "reward.server")),
        ({"--server": ""}, ("--server", "expected local, none or host:port")),
        ({"--server": "a:1", "--reward.ca_file": "absent"}, ("reward.ca_file=absent: No such file",)),
        ({"--server": "a:1", "--reward.token_file": "text.png"}, ("a:1", "plain text", "reward.ca_file")),
        ({"--reward.ca_file": "text.png"}, ("reward.ca_file=text.png", "reward.server=host:port")),
        ({"--seed": "3"}, ("require --sample",)),
        ({"--temperature": "0.5"}, ("require --sample",)),
        ({"--sample": None, "--seed": "-1"}, ("--seed: -1: expected 0 to",)),
        ({"--sample": None, "--temperature": "0"}, ("--temperature", "'0'")),
        ({"--sample": None, "--temperature": "inf"}, ("--temperature", "'inf'")),
        ({"--mesh": "2x2"}, ("--mesh: 2x2: expected 1xTENSOR",)),
        ({"--mesh": "1x99"}, ("needs 99 devices",)),
        ({"--mesh": "1x3"}, ("--mesh=1x3: ", "cannot be split evenly over")),
        ({"--chekpoint": "toy"}, ("--chekpoint", "--help")),
    ],
)
def test_bad_input_is_one_line(
    image: Path,
    changes: dict[str, str | None],
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(image.parent)
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(encoded(PICTURE)[:2000])
    Path("taken").touch()
    Path("hollow").mkdir()
    Path("damaged").mkdir()
    for file in settings_directory("toy").iterdir():
        whole = file.read_bytes()
        Path("damaged", file.name).write_bytes(whole[:5000] if file.suffix == ".safetensors" else whole)
    given = {"--image": "scene.png", "--query": "x", "--checkpoint": "toy", "--out": "out", "--server": "none"}
    arguments = [part for item in (given | changes).items() for part in item if part is not None]
    refused(capsys, arguments, *parts)


def test_a_server_that_cannot_help_is_explained(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def arguments(address: str) -> list[str]:
        out = str(image.parent / "none")
        return ["--image", str(image), "--query", QUESTION, "--checkpoint=toy", "--out", out, "--server", address]

    def half(response: reward_pb2.SegmentResponse) -> None:
        response.candidates[0].mask.width //= 2

    with serving(BoxServer(version=99)) as address:
        refused(capsys, arguments(address), address, "99", f"this client speaks {reward_pb2.API_VERSION_CURRENT}")
    assert "policy:" not in capsys.readouterr().out
    with serving(BoxServer(pixels=0)) as address:
        refused(capsys, arguments(address), "scene.png: ", "takes at most 0 pixels", "expected room")
    server = BoxServer()
    server.change = half
    with serving(server) as address:
        refused(capsys, arguments(address), f"expected a mask of {FRAME.width}x{FRAME.height} pixels")
        # Where both go to one terminal, the error does not stand behind the reasoning.
        assert infer.main(arguments(address)) == 2
        printed = capsys.readouterr().out
        assert "thinking: " in printed
        assert printed.endswith("\n")


def test_a_server_behind_tls_is_reached_with_its_authority(image: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    cert, key = authority.sign("rewards", "rewards")
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    with serving(BoxServer(), credentials) as address:
        access = ("--reward.ca_file", str(authority.ca), "--reward.tls_name=rewards")
        assert ask(image, "--server", address, *access)["sam"] != ""


def test_an_answer_that_sam_refuses_is_kept_without_a_mask(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(response: reward_pb2.SegmentResponse) -> None:
        response.candidates[0].status.CopyFrom(reward_pb2.Status(code=3, message="objects[0]: far away"))

    server = BoxServer()
    server.change = refuse
    with serving(server) as address:
        row = ask(image, "--server", address)
    assert (row["mask"], row["error"]) == (None, "objects[0]: far away")
    assert "mask: none, SAM 2 refused the answer: objects[0]: far away" in capsys.readouterr().out


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    infer.write_together(folder, {"a": b"old"})
    with pytest.raises(FileNotFoundError):
        infer.write_together(folder, {"a": b"new", "b/c": b"new"})
    assert [path.read_bytes() for path in folder.iterdir()] == [b"old"]
    infer.write_together(folder, {"a": b"1", "b": b"2"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}
    infer.write_together(folder, {"a": None, "b": b"3", "c": None})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"b": b"3"}


def test_what_a_model_says_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    options.say("a\x1b[2Jb\u202ec\r é\n猫")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202ec\\r é\n猫\n"
    infer.Reasoning()("<think>a\x1b[2Jb")
    assert capsys.readouterr().out == "thinking: a\\x1b[2Jb"


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        infer.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    names = ("image", "query", "checkpoint", "out", "server", "sam", "image-size", "prompt", "sample", "mesh")
    for option in (*names, "queries", "demo", "reward.ca_file", "reward.token_file"):
        assert f"--{option}" in printed
