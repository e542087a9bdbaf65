"""A run as a Hugging Face directory: the same numbers in transformers, all that goes with them, or nothing at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from box_server import FRAME, PICTURE, encoded
from etils import epath
from safetensors.numpy import load_file
from tiny import DIMS, encode, hf_config, load_processor, random_policy
from torch_policy import torch_inputs
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from segzero_jax import asking, export
from segzero_jax import config as configs
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.checkpoint_paths import locate
from segzero_jax.config import Config, ConfigError
from segzero_jax.grpo import TrainState
from segzero_jax.hub import TOY
from segzero_jax.identity import Identity
from segzero_jax.manifest import ManifestHandler
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model import load_hf, save_hf
from segzero_jax.model.policy import ForwardConfig, prompt_logits
from segzero_jax.model.weights import CheckpointError
from segzero_jax.processor import Processor
from segzero_jax.rollout import Sampling
from segzero_jax.types import Example, Rollout

ROOT = Path(__file__).parents[1]
RELATIVE = 1e-4
STEPS = (9, 10)
# What an earlier version did not write of how a run asks and scores, none of it as by default.
HOW = {
    "data.resampling": "bilinear",
    "rollout.temperature": 0.7,
    "rollout.top_p": 0.9,
    "rollout.top_k": 50,
    "reward.mask_iou_weight": 0.0,
    "reward.mask_iou_mode": "threshold",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, 10 newer than 9, of a base model that has all files a released one has."""
    # A folder of its own: a test process may come back to these tests, and set them up once more.
    base = tmp_path_factory.mktemp("made") / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (base / name).write_bytes((TOY / name).read_bytes())
    template = json.loads((TOY / "tokenizer_config.json").read_text())["chat_template"]
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    (base / "LICENSE").write_text("as you like")
    (base / "vocab.json").write_text("{}")
    (base / "merges.txt").write_text("#version: 0.2\n")
    (base / "config.json").write_text(json.dumps(hf_config(torch_dtype="bfloat16")))
    directory = base.parent / "some_run"
    config = configs.replace(Config(), **{"model.path": str(base), "run.dir": str(directory)}, **HOW)
    with jax.set_mesh(make_mesh("2x2")), Checkpoints(directory / "checkpoints") as checkpoints:
        save_hf(random_policy(), DIMS, base)
        for step in STEPS:
            state = TrainState(random_policy(seed=step), (), jnp.int32(step))
            checkpoints.save(step, state, {}, config, Identity("", None))
        checkpoints.wait()
    return directory


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that bad input gives."""
    try:
        code = export.main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(str(left.code))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_reads_the_numbers_of_the_newest_checkpoint(
    run: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert export.main(["--run", str(run), "--out", str(out), "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    assert all(str(file) in printed for file in out.iterdir())
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["out"]

    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == getattr(torch, dtype), "config.json tells the truth about the weights"
    with jax.set_mesh(make_mesh("1x1")):
        wanted = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), random_policy(seed=STEPS[-1]))
        policy, dims = load_hf(out)
        for got, want in zip(jax.tree.leaves(policy), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(got, want)
        processor = load_processor()
        prompt = encode(processor, "the red one", [(84, 56)])
        ours = prompt_logits(policy, processor.batch([prompt], 8), ForwardConfig(dims, TRAIN, jnp.dtype("float32")))[0]
    with torch.no_grad():
        theirs = model.float()(**torch_inputs(prompt, processor)).logits[0].numpy()
    assert np.abs(ours[: len(theirs)] - theirs).max() <= RELATIVE * np.abs(theirs).max()


def test_everything_beside_the_weights_comes_along(run: Path, tmp_path: Path) -> None:
    assert export.main(["--run", str(run), "--out", str(tmp_path / "out"), "--step", "9"]) == 0
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "as you like"
    assert {"vocab.json", "merges.txt"} <= {file.name for file in out.iterdir()}
    assert GenerationConfig.from_pretrained(out).temperature == 0.5
    text = "Find the red circle."
    turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    theirs = AutoProcessor.from_pretrained(out)
    assert text in theirs.apply_chat_template(turn, tokenize=False)
    assert theirs.tokenizer(text).input_ids == Processor.load(out, 56, "toy", 64).encode_text(text)
    assert theirs.image_processor.patch_size == 14
    origin = json.loads((out / "segzero_jax.json").read_text())
    assert (origin["run"], origin["step"], origin["dtype"]) == ("some_run", 9, "bfloat16")
    written = load_file(out / "model.safetensors")["model.norm.weight"]
    with jax.set_mesh(make_mesh("1x1")):
        wanted = np.asarray(random_policy(seed=9).final_norm_d[...]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(written, wanted)


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_masks_of_an_export_are_by_the_sam2_that_its_run_s_are_by(preset: Path, tmp_path: Path) -> None:
    run = configs.load(preset)
    (tmp_path / "config.json").touch()
    (tmp_path / asking.ORIGIN).write_text(json.dumps({"asked": asking.asked(run)}))
    exported = asking._as_released(str(tmp_path), None)
    assert asking.default_sam(exported) == asking.default_sam(run)
    assert (asking.default_sam(run) == "toy") == (run.model.path == "toy")


def test_an_export_is_asked_as_its_run_asks(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sampling] = []

    def parts(*_: object, sampling: Sampling, **__: object) -> Iterator[Rollout]:
        asked.append(sampling)
        yield Rollout(np.zeros((1, 1, 1), int), np.ones((1, 1), int), np.zeros((1, 1, 1)), np.ones((1, 1), bool))

    monkeypatch.setattr(asking, "sample_in_parts", parts)
    out = tmp_path / "out"
    assert export.main(["--run", str(run), "--out", str(out)]) == 0
    changed = {"data.image_size": 56, "data.prompt": "seg_zero", "reward.recipe": "seg_zero_strict"}
    origin = json.loads((out / "segzero_jax.json").read_text())
    assert origin["asked"].items() >= {"data.image_size": 112, "data.prompt": "toy"}.items()
    as_trained = configs.replace(Config(), **HOW)
    with jax.set_mesh(make_mesh("1x1")):
        loaded = asking.load(str(out))
        asking.respond(loaded, Example("it", encoded(PICTURE), FRAME, "the red one", (), None), seed=0)
        asked.append(asking.make_sampling(loaded.config.rollout, loaded.processor))  # as in training
        assert [(one.temperature, one.top_p, one.top_k) for one in asked] == [(0.7, 0.9, 50)] * 2
        config = loaded.config
        assert (config.data, config.rollout, config.reward) == (as_trained.data, as_trained.rollout, as_trained.reward)
        assert config.model.compute_dtype == "float32"
        earlier = origin | {"asked": {key: value for key, value in origin["asked"].items() if key not in HOW}}
        (out / "segzero_jax.json").write_text(json.dumps(earlier))
        config = asking.load(str(out)).config
        assert (config.data, config.rollout, config.reward) == (Config().data, Config().rollout, Config().reward)
        origin["asked"] |= changed
        (out / "segzero_jax.json").write_text(json.dumps(origin))
        config = asking.load(str(out)).config
        assert (config.data.image_size, config.data.prompt, config.reward.recipe) == tuple(changed.values())
        for broken in ("[]", "{", '{"asked": 3}'):
            (out / "segzero_jax.json").write_text(broken)
            with pytest.raises(CheckpointError, match=r"segzero_jax\.json: not what segzero_jax\.export writes"):
                asking.load(str(out))


def test_a_run_of_other_options_is_not_the_mesh_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_policy(*_: object) -> None:
        raise ConfigError("run/config.yaml: unknown key 'train.of_another_version'")

    monkeypatch.setattr(asking, "load_policy", load_policy)
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(ConfigError, match=r"unknown key 'train\.of_another_version'"):
        asking.load("toy")


def test_an_earlier_export_is_replaced_whole(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: as good as new
    assert export.main(["--run", str(run), "--out", str(out), "--step", "9"]) == 0
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of yesterday")
    assert export.main(["--run", str(run), "--out", str(out)]) == 0
    assert json.loads((out / "segzero_jax.json").read_text())["step"] == 10
    assert not (out / "model-00001-of-00002.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed_and_stays(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    for there in ("out", "out", "other"):  # what is to be there, what is there, and from another place
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "disk" / there)
        assert export.main(["--run", str(run), "--out", str(link)]) == 0
        assert link.is_symlink()
        assert str(link / "config.json") in capsys.readouterr().out
        assert (tmp_path / "disk" / there / "config.json").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "link"]


def test_what_cannot_be_replaced_is_refused_before_anything_is_read(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "disk")
    monkeypatch.setattr(export, "load_policy", lambda *_: pytest.fail("read"))
    for out in (".", tmp_path / "here"):
        assert f"--out={out}: is the current folder, which cannot be replaced" in said(
            capsys, "--run", run, "--out", out
        )
    for out in (tmp_path / "disk", tmp_path / "link"):
        assert f"--out={out}: is where a disk is mounted" in said(capsys, "--run", run, "--out", out)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "here", "link"]


def test_bad_input_is_one_line_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, taken, file = tmp_path / "out", tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file.touch()
    assert "holds thesis.tex; expected a new directory" in said(capsys, "--run", run, "--out", taken)
    assert "holds config.json; expected a new directory or an earlier export" in said(
        capsys, "--run", run, "--out", model
    )
    assert "is a file" in said(capsys, "--run", run, "--out", file)
    assert "no checkpoints there" in said(capsys, "--run", tmp_path, "--out", out)
    assert "no checkpoints there" in said(capsys, "--run", "toy", "--out", out)
    both = said(capsys, "--run", f"{run}/checkpoints/9", "--out", out, "--step", 7)
    assert both.removeprefix(f"segzero_jax.export: --run={run}/checkpoints/9: ") == (
        "is step 9, --step=7; leave out --step, or the number in --run\n"
    )
    missing = said(capsys, "--run", run, "--out", out, "--step", 7)
    assert "no complete checkpoint there" in missing
    assert "9, 10" in missing
    assert "--step" in said(capsys, "--run", run, "--out", out, "--step", "last")
    assert "--out" in said(capsys, "--run", run)
    assert (taken / "thesis.tex").read_text() == "years of work"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "model", "taken"]


def test_a_run_in_a_bucket_is_named_by_its_own_path(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bucket: what is asked for under its name is found here."""

    def there(path: object) -> tuple[epath.Path, int | None] | None:
        assert str(path).startswith("gs://"), "pathlib leaves one slash of two"
        return locate(str(path).replace("gs://bucket", str(run.parent)))

    monkeypatch.setattr(export, "locate", there)
    monkeypatch.setattr(asking, "locate", there)
    for name, steps in {"gs://bucket/some_run": (9, None), "gs://bucket/some_run/checkpoints": (None,)}.items():
        for step in steps:
            out = tmp_path / f"{Path(name).name}-{step}"
            options = [] if step is None else [f"--step={step}"]
            assert export.main([f"--run={name}", f"--out={out}", *options]) == 0
            origin = json.loads((out / "segzero_jax.json").read_text())
            assert (origin["run"], origin["step"]) == (Path(name).name, step or 10)
    capsys.readouterr()
    nothing = said(capsys, "--run=gs://bucket/other", "--out", tmp_path / "out")
    assert "--run=gs://bucket/other: no checkpoints there" in nothing

    class HttpError(Exception):
        """As gcsfs and google.auth have them."""

    monkeypatch.setattr(export, "locate", locate)
    for error, expected in {
        HttpError("Cannot connect\nto host"): "cannot be read now (HttpError: Cannot connect to host)",
        ImportError("no gcsfs"): "cannot be read without a further package (ImportError: no gcsfs); "
        "for gs://, .venv/bin/pip install -c constraints.txt -e '.[tpu]' brings it",
    }.items():

        def away(*_: object, error: Exception = error) -> bool:
            raise error

        monkeypatch.setattr(type(epath.Path("gs://bucket")), "is_dir", away)
        assert f"gs://bucket/some_run: {expected}" in said(
            capsys, "--run=gs://bucket/some_run", "--out", tmp_path / "out"
        )


def test_an_export_goes_to_this_machines_disk(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = said(capsys, "--run", run, "--out=gs://bucket/out")
    assert "--out=gs://bucket/out: expected a folder on this machine's disk, got a URL; export to a disk" in refused
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["the base model is gone", "cut short", "the disk is full"])
def test_what_breaks_on_the_way_leaves_nothing(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", run, copy], check=True)
    expected = "expected a Hugging Face checkpoint"
    if case == "the base model is gone":
        for note in copy.glob("checkpoints/*/run/**/*"):
            if note.is_file() and "model" in note.read_text():
                note.write_text(note.read_text().replace(json.dumps(str(run.parent))[1:-1], "/nowhere"))
        for step in copy.glob("checkpoints/*/manifest"):
            ManifestHandler().finalize(epath.Path(step))
    elif case == "cut short":
        expected = "is damaged (policy/"
        for part in copy.glob("checkpoints/10/policy/**/d/*"):
            os.truncate(part, part.stat().st_size // 2)
    else:
        expected = "No space left"

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("segzero_jax.model.tensor_files.save_file", full)
    assert expected in said(capsys, "--run", copy, "--out", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_it_runs_as_a_command(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "segzero_jax.export", "--run", str(run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"wrote {tmp_path / 'out'}")
    assert done.stderr == ""
