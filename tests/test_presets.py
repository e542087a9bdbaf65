"""The files in configs/: all load, say how they are run, and hold what they claim to hold."""

import re
import shlex
from pathlib import Path

import pytest

from segzero_jax import config, rewards
from segzero_jax.config import Config
from segzero_jax.mesh import parse_mesh
from segzero_jax.prompt import WORDINGS

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = [path for path in PRESETS if path.stem != "toy"]
ABLATIONS = sorted((ROOT / "configs/ablations").glob("*.yaml"))
WITHOUT_THINKING = (
    WORDINGS["seg_zero"]
    .replace("the thinking process in <think> </think> and final answer", "the final answer")
    .replace("<think> thinking process here </think>", "")
)
WITHOUT_EXAMPLE = WORDINGS["seg_zero"].partition("i.e., ")[0]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])


def preset(stem: str) -> Config:
    return config.load(ROOT / "configs" / f"{stem}.yaml")


def test_the_presets_are_there():
    assert {path.stem for path in PRESETS} >= {"toy", "seg_zero_3b", "seg_zero_7b", "vision_reasoner_7b", "sam_r1_7b"}
    assert ABLATIONS


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_its_header_runs_it(path):
    """The command in the header names this very file and flags that exist; it gives the mesh that the file has."""
    command = re.search(r"python -m segzero_jax\.train (.*)", header(path))
    assert command, "no command in the header"
    words = shlex.split(command.group(1))
    assert words[:2] == ["--config", name(path)]
    loaded = config.load(path, [word.removeprefix("--") for word in words[2:]])
    assert set(config.differing_keys(loaded, config.load(path))) <= {"reward.server", "run.checkpoint_dir"}
    assert "Hardware:" in header(path)
    # Several hosts, each with a disk of its own.
    assert loaded.run.checkpoint_dir.startswith("gs://") == ("v5e-16" in header(path))


@pytest.mark.parametrize("path", PRESETS, ids=name)
def test_every_row_of_the_mesh_gets_prompts(path):
    loaded = config.load(path)
    data, fsdp, _ = parse_mesh(loaded.mesh)
    assert loaded.train.micro_batch_size % (data * fsdp) == 0


@pytest.mark.parametrize(
    ("stem", "heading", "case"),
    [("seg_zero_7b", "7B on v5e-16", "7b_v5e_4x4"), ("seg_zero_3b", "3B on v5e-8", "3b_v5e_2x4")],
)
def test_what_a_header_says_of_the_plan_is_what_was_measured_last(stem, heading, case):
    measured = (ROOT / "docs/scaling.md").read_text()
    table = measured.partition(f"## Seg-Zero-{heading}\n")[2].partition("\n## ")[0]
    gib = {phase: float(value) for phase, value in re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) \|", table, re.MULTILINE)}
    row = re.search(rf"^\| {case} \|.*?in update \| ([\d.]+) \|", measured, re.MULTILINE)
    assert row
    memory = f"{gib['update']:.1f} of 15.75 GiB a chip in the update, {gib['decode']:.1f} while sampling"
    assert f"{memory}; at least {row[1]} s a step" in header(ROOT / f"configs/{stem}.yaml")
    if stem == "seg_zero_7b":
        steps, seconds = preset(stem).train.steps, float(row[1])
        costs = f"{steps} steps of at least {row[1]} s are {steps * seconds / 3600:.1f} hours"
        assert costs in (ROOT / "tpu/README.md").read_text()


def test_the_toy_preset_is_the_built_in_default():
    assert config.differing_keys(preset("toy"), Config()) == []


@pytest.mark.parametrize("path", PAPER, ids=name)
def test_paper_presets_hold_the_facts_that_all_papers_share(path):
    """arXiv 2503.06520, 2505.12081 and their released code."""
    loaded = config.load(path)
    assert "Expected (the paper, gIoU" in header(path)
    assert (loaded.data.image_size, loaded.data.resampling) == (840, "bilinear")
    assert loaded.rollout.max_prompt_tokens == 1300
    assert (loaded.rollout.temperature, loaded.rollout.top_p, loaded.rollout.top_k) == (1.0, 1.0, 0)
    assert loaded.train.batch_size == 16
    assert (loaded.train.lr, loaded.train.weight_decay, loaded.train.max_grad_norm) == (1e-6, 1e-2, 1.0)
    assert (loaded.train.beta1, loaded.train.beta2) == (0.9, 0.999)
    assert (loaded.grpo.clip_low, loaded.grpo.entropy_coef) == (0.2, 1e-3)
    assert (loaded.model.compute_dtype, loaded.model.remat) == ("bfloat16", True)


@pytest.mark.parametrize(
    ("stem", "size", "mesh", "recipe", "prompt", "response", "kl", "clip_high", "mean"),
    [
        ("seg_zero_3b", "3B", "2x4", "seg_zero_strict", "seg_zero", 1300, 5e-3, 0.2, "responses"),
        ("seg_zero_7b", "7B", "4x4", "seg_zero_strict", "seg_zero", 1300, 5e-3, 0.2, "responses"),
        ("vision_reasoner_7b", "7B", "4x4", "vision_reasoner", "vision_reasoner", 2000, 1e-2, 0.2, "tokens"),
        ("sam_r1_7b", "7B", "4x4", "sam_r1", "seg_zero", 1300, 5e-3, 0.3, "tokens"),
    ],
)
def test_paper_presets_hold_what_is_their_own(stem, size, mesh, recipe, prompt, response, kl, clip_high, mean):
    loaded = preset(stem)
    assert loaded.model.path == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    assert (loaded.mesh, loaded.rollout.group_size) == (mesh, 8)
    assert (loaded.reward.recipe, loaded.data.prompt) == (recipe, prompt)
    assert loaded.rollout.max_response_tokens == response
    assert (loaded.grpo.kl_coef, loaded.grpo.clip_high, loaded.grpo.loss_mean) == (kl, clip_high, mean)
    assert loaded.reward.mask_iou_weight == 0


def test_each_ablation_changes_what_its_name_says():
    baseline = preset("ablations/baseline")
    assert config.differing_keys(baseline, preset("seg_zero_3b")) == ["reward.recipe", "run.dir"]
    changed = {"kl": "grpo.kl_coef", "group": "rollout.group_size"}
    named = {
        "strict": {"reward.recipe": "seg_zero_strict"},
        "soft_accuracy": {"reward.recipe": "seg_zero_soft_accuracy"},
        "no_thinking": {"reward.recipe": "seg_zero_no_thinking", "data.prompt": WITHOUT_THINKING},
        "no_example": {"data.prompt": WITHOUT_EXAMPLE},
        # Twice the tokens of a prompt, which four chips share.
        "group_16": {"rollout.group_size": 16, "train.micro_batch_size": 2},
    }
    for path in ABLATIONS:
        if path.stem == "baseline":
            continue
        kind, _, value = path.stem.partition("_")
        changes = named[path.stem] if path.stem in named else {changed[kind]: float(value)}
        assert config.load(path) == config.replace(baseline, **changes, **{"run.dir": f"runs/ablations/{path.stem}"})
    assert {path.stem for path in ABLATIONS} >= named.keys()


def test_wordings_of_ablations_are_seg_zeros_with_one_thing_left_out():
    assert WITHOUT_THINKING.count("think") == 0
    assert WITHOUT_EXAMPLE.endswith("in JSON format.")
    shown = WITHOUT_THINKING.rpartition("i.e., ")[2].replace("'", '"')
    target = "<box>(10,100),(200,210)</box><points>(30,110),(35,180)</points>"
    assert rewards.score("seg_zero_no_thinking", shown, target).total == 5


def test_runs_do_not_overwrite_each_other():
    folders = [config.load(path).run.dir for path in PRESETS]
    assert len(folders) == len(set(folders))
