"""The main job as a user runs it: a command, a run directory, a report."""

import errno
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import same_run

from segzero_jax import config as configs
from segzero_jax import job, loop, train
from segzero_jax.checkpoint import SaveError
from segzero_jax.code_version import Code, this_code
from segzero_jax.config import Config
from segzero_jax.evaluate import __main__ as evaluate
from segzero_jax.grpo import TrainState, UpdateBatch, learn, policy_logps, update
from segzero_jax.hub import model_directory
from segzero_jax.model.weights import load_hf
from segzero_jax.processor import Processor
from segzero_jax.record import metric_keys
from segzero_jax.report.run import read_run, reward_maxima
from segzero_jax.rollout import sample
from segzero_jax.time_account import BESIDE

ROOT = Path(__file__).parents[2]
SMALL = ["--train.batch_size=4", "--train.micro_batch_size=4", "--rollout.group_size=2"]
SMALL += ["--eval.examples=4", "--eval.samples=2", "--data.eval_splits=[val]"]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def pictures_alive() -> int:
    """Batches of pictures on the devices."""
    channels = Processor.load("toy", 112, "toy", 64).vision.patch_width
    return sum(x.ndim == 4 and x.shape[-1] == channels for x in jax.live_arrays())


def keys(row: dict) -> set[str]:
    """Of a line, those that all lines have."""
    return row.keys() - {"step", *(f"time/{name}" for name in BESIDE)}


@pytest.mark.slow
@pytest.mark.longest
def test_mesh_4x4_on_a_cpu_trains_against_sam_2(tmp_path: Path, data_dir: str) -> None:
    """The command of the README, in a process of its own: local SAM 2 server, 16 virtual devices, all files written."""
    command = [sys.executable, "-m", "segzero_jax.train", "--mesh=4x4", "--train.steps=2", f"--run.dir={tmp_path}/run"]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    small = ["--eval.examples=4", "--data.eval_splits=[val]", f"--data.dir={data_dir}", "--train.micro_batch_size=8"]
    small += ["--rollout.max_response_tokens=48"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert keys(row) == set(metric_keys(Config()))
        assert 0 <= row["reward/mask_iou"] <= 1
        assert row["missing_scores"] == 0
        assert row["kl"] >= 0
        assert row["grad_norm"] > 0
        assert row["sampler_gap"] < 1e-4
    rollouts = lines(run / "rollouts" / "2.jsonl")
    assert len(rollouts) == 16 * 8
    for row in rollouts:
        weighted = sum(row["components"].values())
        assert row["reward"] == pytest.approx(weighted)
    assert {(row["step"], row["mode"]) for row in lines(run / "evaluations.jsonl")} == {
        (step, mode) for step in (0, 2) for mode in ("greedy", "sampled")
    }
    assert (run / "report.html").stat().st_size > 10_000
    assert "report:" in done.stdout
    assert "held-out gIoU" in done.stdout


@pytest.mark.slow
def test_resume_goes_on_after_the_checkpoint_and_update_compiles_once(tmp_path: Path, data_dir: str) -> None:
    arguments = [*SMALL, f"--data.dir={data_dir}", "--reward.server=none", "--train.checkpoint_every=2"]
    arguments += ["--train.lr=1e-4", "--train.warmup_steps=4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    update.clear_cache()
    assert train.main([*arguments, "--train.steps=4", f"--run.dir={whole}"]) == 0
    assert update._cache_size() == 1
    assert train.main([*arguments, "--train.steps=2", f"--run.dir={parts}"]) == 0
    assert train.main([*arguments, "--train.steps=4", f"--run.dir={parts}", "--resume"]) == 0
    assert same_run.lines(parts / "metrics.jsonl") == same_run.lines(whole / "metrics.jsonl")
    assert [row["lr"] for row in lines(parts / "metrics.jsonl")] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])
    alone = configs.replace(Config(), **{"reward.server": "none"})
    assert [keys(row) for row in lines(parts / "metrics.jsonl")] == [set(metric_keys(alone))] * 4
    assert lines(parts / "rollouts" / "4.jsonl") == lines(whole / "rollouts" / "4.jsonl")


@pytest.mark.slow
def test_adapters_learn_go_on_exactly_and_are_evaluated_as_they_were_in_the_run(tmp_path: Path, data_dir: str) -> None:
    arguments = [*SMALL, f"--data.dir={data_dir}", "--reward.server=none", "--train.checkpoint_every=1"]
    arguments += ["--model.lora_rank=4", "--train.lr=3e-3", "--rollout.max_batches=2", "--model.compute_dtype=bfloat16"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*arguments, "--train.steps=2", f"--run.dir={whole}"]) == 0
    assert train.main([*arguments, "--train.steps=1", f"--run.dir={parts}"]) == 0
    assert train.main([*arguments, "--train.steps=2", f"--run.dir={parts}", "--resume"]) == 0
    rows = same_run.lines(whole / "metrics.jsonl")
    assert same_run.lines(parts / "metrics.jsonl") == rows
    assert lines(parts / "rollouts/2.jsonl") == lines(whole / "rollouts/2.jsonl")
    # Reference and update are two programs, whose float32 sums may differ in the last bit; bfloat16's would be 1e-5.
    assert 0 <= rows[0]["kl"] < 1e-12
    assert rows[1]["kl"] > 1e-6, "the second update is measured after the first"
    assert all(row["grad_norm"] > 0 for row in rows)
    out = [f"--out={tmp_path}/out", "--server=none", f"--data-dir={data_dir}", "--limit=4", "--batch=4"]
    assert evaluate.main(["--dataset=toy/val", f"--checkpoint={whole}", *out]) == 0
    (found,) = (tmp_path / "out").glob("toy-val/*/samples.jsonl")
    (greedy,) = (whole / "evaluations").glob("*2*.jsonl")
    assert [row["text"] for row in lines(found)] == [row["text"] for row in lines(greedy)]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["false", "true"])
def test_policy_and_reference_round_alike(tmp_path: Path, data_dir: str, remat: str) -> None:
    """In bfloat16, where a program that loops in another way over the same blocks rounds otherwise."""
    arguments = [*SMALL, f"--data.dir={data_dir}", f"--run.dir={tmp_path}/run", "--reward.server=none"]
    how = ["--train.steps=1", "--model.compute_dtype=bfloat16", f"--model.remat={remat}"]
    assert train.main([*arguments, *how]) == 0
    (row,) = lines(tmp_path / "run/metrics.jsonl")
    assert 0 <= row["kl"] < 1e-12
    assert row["sampler_gap"] < 6e-4


@pytest.mark.slow
def test_without_kl_no_reference_is_read_and_the_page_is_written(
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(job, "load_hf", lambda *where, **how: read.append(how) or load_hf(*where, **how))
    arguments = [*SMALL, f"--data.dir={data_dir}", f"--run.dir={tmp_path}/run", "--reward.server=none"]
    assert train.main([*arguments, "--train.steps=2", "--grpo.kl_coef=0"]) == 0
    assert read == [{}]
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    without = configs.replace(Config(), **{"reward.server": "none", "grpo.kl_coef": 0})
    assert [keys(row) for row in rows] == [set(metric_keys(without))] * 2
    assert all(row["grad_norm"] > 0 for row in rows)
    assert "KL to the reference" not in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_what_a_step_learns_from(tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old log-probabilities of the policy that sampled, advantages as configured, and only what ended by itself."""
    seen = []

    def watched(state: TrainState, batch: UpdateBatch, keep_bg: np.ndarray, **how: Any) -> Any:
        run = {"fwd": how["fwd"], "loss_config": how["loss_config"]}
        old = policy_logps(state.params, batch.prompts, batch.rollout.tokens_bgr, **run)
        ref, advantages_bg = np.array(batch.ref_logps_bgr), np.array(batch.advantages_bg)
        seen.append((np.array(old), np.array(batch.old_logps_bgr), ref, advantages_bg, keep_bg))
        return learn(state, batch, keep_bg, **how)

    monkeypatch.setattr(loop, "learn", watched)
    arguments = [*SMALL, f"--data.dir={data_dir}", f"--run.dir={tmp_path}/run", "--reward.server=none"]
    arguments += ["--train.mini_batch_size=2", "--train.micro_batch_size=2", "--rollout.max_response_tokens=47"]
    arguments += ["--grpo.norm_adv_by_std=false", "--grpo.mask_truncated=true", "--train.steps=2"]
    assert train.main(arguments) == 0
    for step, (old, given, ref, advantages_bg, keep_bg) in enumerate(seen, 1):
        np.testing.assert_array_equal(given, old)
        assert (np.abs(ref - old).max() > 1e-6) == (step == 2), "the reference does not learn"
        rows = lines(tmp_path / f"run/rollouts/{step}.jsonl")
        assert keep_bg.ravel().tolist() == [row["finished"] for row in rows]
        rewards = np.reshape([row["reward"] for row in rows], keep_bg.shape)
        expected = np.where(keep_bg, rewards - rewards.mean(axis=1, keepdims=True), 0)
        np.testing.assert_allclose(advantages_bg, expected, atol=1e-6)
        np.testing.assert_allclose(advantages_bg.ravel(), [row["advantage"] for row in rows])
    (first, second), alone = lines(tmp_path / "run/metrics.jsonl"), configs.load(tmp_path / "run/config.yaml")
    assert keys(first) == keys(second) == set(metric_keys(alone))
    assert 0 < second["kl_old"] < second["kl"]
    assert len({bool(kept) for *_, keep_bg in seen for kept in keep_bg.ravel()}) == 2, "some were cut off, some not"
    assert any(np.abs(advantages_bg).max() > 0 for *_, advantages_bg, _ in seen)


@pytest.mark.slow
def test_a_step_samples_until_all_its_groups_teach_something(
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch is of other questions and draws other noise; a run that goes on samples what it would have."""
    seen = []

    def watched(state: TrainState, batch: UpdateBatch, keep_bg: np.ndarray, **how: Any) -> Any:
        run = {"fwd": how["fwd"], "loss_config": how["loss_config"]}
        old = policy_logps(state.params, batch.prompts, batch.rollout.tokens_bgr, **run)
        mask = np.arange(old.shape[2]) < np.array(batch.rollout.length_bg)[..., None]
        gap = np.abs(np.where(mask, np.array(old) - np.array(batch.rollout.logps_bgr), 0)).max()
        seen.append((np.array(batch.advantages_bg), keep_bg, gap))
        assert pictures_alive() == 1, "of what was sampled, what is learnt from"
        return learn(state, batch, keep_bg, **how)

    def sampled(*given: Any, **how: Any) -> Any:
        alive.append(pictures_alive())
        return sample(*given, **how)

    alive: list[int] = []
    monkeypatch.setattr(loop, "learn", watched)
    monkeypatch.setattr(loop, "sample", sampled)
    arguments = [*SMALL, f"--data.dir={data_dir}", "--reward.server=none", "--rollout.max_batches=3"]
    arguments += ["--train.checkpoint_every=2", "--rollout.max_response_tokens=47"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*arguments, "--train.steps=4", f"--run.dir={whole}"]) == 0
    rows = lines(whole / "metrics.jsonl")
    assert [keys(row) for row in rows] == [set(metric_keys(configs.load(whole / "config.yaml")))] * 4
    for row, (advantages_bg, keep_bg, gap) in zip(rows, seen, strict=True):
        rollouts = lines(whole / f"rollouts/{row['step']}.jsonl")
        batches = row["dynamic_sampling/batches"]
        assert len(rollouts) == batches * 4 * 2
        teaching = (advantages_bg != 0).any(axis=1)
        assert teaching.sum() == row["dynamic_sampling/groups"] == (~(keep_bg == 0).all(axis=1)).sum()
        assert teaching.all() or batches == 3
        assert np.count_nonzero([one["advantage"] for one in rollouts]) == np.count_nonzero(advantages_bg)
        assert gap < 1e-4, "each group has its own prompt and its own answers"
        assert row["reward/mean"] == pytest.approx(np.mean([one["reward"] for one in rollouts])), "of all, not of these"
        assert len({one["id"] for one in rollouts}) == batches * 4
    batches = [row["dynamic_sampling/batches"] for row in rows]
    assert max(batches) > 1
    assert alive == [n + 1 for count in batches for n in range(count)], "no pictures of the step before"
    assert train.main([*arguments, "--train.steps=2", f"--run.dir={parts}"]) == 0
    assert train.main([*arguments, "--train.steps=4", f"--run.dir={parts}", "--resume"]) == 0
    for step in range(1, 5):
        assert lines(parts / f"rollouts/{step}.jsonl") == lines(whole / f"rollouts/{step}.jsonl")


@pytest.mark.slow
def test_a_reward_of_one_s_own_is_learnt_from_and_its_changes_are_told(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "rewards_of_this_test.py"
    module.write_text("def long(answer):\n    return 10.0 * ('it' in answer.text)\n")
    arguments = [*SMALL, f"--data.dir={data_dir}", f"--run.dir={tmp_path}/run", "--reward.server=none"]
    arguments += ["--reward.functions=[rewards_of_this_test:long]", "--train.keep_best=reward/long"]
    assert train.main([*arguments, "--train.steps=1"]) == 0
    (row,) = lines(tmp_path / "run/metrics.jsonl")
    rollouts = lines(tmp_path / "run/rollouts/1.jsonl")
    assert [one["components"]["long"] for one in rollouts] == [10.0 * ("it" in one["text"]) for one in rollouts]
    assert all(one["reward"] == sum(one["components"].values()) for one in rollouts)
    assert row["reward/long"] == np.mean([one["components"]["long"] for one in rollouts])
    assert reward_maxima(read_run(tmp_path / "run")).total is None, "who knows what a function gives at most"
    module.write_text("def long(answer):\n    return 5.0\n")
    monkeypatch.setattr(train, "this_code", lambda: Code("9.9", "", "0123456789abcdef"))
    capsys.readouterr()
    assert train.main([*arguments, "--train.steps=2"]) == 0
    said = "".join(capsys.readouterr())
    assert "the file of the reward function long has changed: numbers may differ" in said
    assert f"the code was {this_code()} then, and is 9.9, source 01234567: numbers may differ" in said
    assert train.main([*arguments[:-2], "--train.steps=2"]) == 2
    assert "(reward.functions" in capsys.readouterr().err
    assert train.main([*arguments, "--reward.functions=[absent:long]"]) == 2


@pytest.mark.slow
def test_what_was_cut_off_is_left_out_where_that_is_asked_for(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the first step nothing is left, so nothing is learnt; its rewards are told all the same."""
    arguments = [*SMALL, f"--data.dir={data_dir}", f"--run.dir={tmp_path}/run", "--reward.server=none"]
    arguments += ["--rollout.max_response_tokens=8", "--train.steps=1"]
    assert train.main([*arguments, "--grpo.mask_truncated=true"]) == 0
    (row,) = lines(tmp_path / "run/metrics.jsonl")
    assert row["finished"] == 0
    assert row["reward/mean"] is not None
    assert row["missing_scores"] == 0
    assert "loss" not in row
    said = capsys.readouterr()
    assert "step 1: this step makes no update, all scored responses were cut off" in said.out + said.err


BAD = {
    "unknown key": (["--train.stepz=2"], "did you mean 'train.steps'"),
    "mesh text": (["--mesh=4by4"], "expected FSDPxTENSOR"),
    "mesh and heads": (["--mesh=1x3"], "8 attention heads cannot be split evenly over tensor = 3"),
    "mesh and batch": (["--mesh=3x1"], "cannot be split evenly over"),
    "no checkpoint": (["--resume"], "no checkpoint to resume from"),
    "no model": (["--model.path=nowhere"], "model.path=nowhere"),
    "prompt too long": (
        ["--rollout.max_prompt_tokens=40", "--reward.server=none"],
        "expected at most max_prompt_tokens=40",
    ),
    "no such data": (["--data.name=nothing", "--reward.server=none"], "data set 'nothing'"),
    "toy SAM 2": (["--data.name=mugs"], "expected another SAM 2 for reward.server=local, such as"),
    "no room for data": (["--data.dir=/dev/null/data"], "data set 'toy': cannot be built in /dev/null/data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = BAD[case]
    run = tmp_path / "run"
    try:
        code = train.main([f"--data.dir={data_dir}", f"--run.dir={run}", *SMALL, *arguments])
    except SystemExit as left:
        code = left.code
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert expected in complaint
    assert complaint.startswith("segzero_jax.train: ")
    assert not list(run.rglob("*.jsonl"))


def test_a_reward_server_that_is_away_is_no_mistake_of_the_user_and_leaves_nothing(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    away = ["--reward.server=localhost:9", "--reward.timeout_s=1"]
    assert train.main([f"--data.dir={data_dir}", f"--run.dir={run}", *SMALL, *away]) == 3
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("segzero_jax.train: reward server localhost:9")
    assert not list(run.rglob("*.jsonl"))


def test_storage_that_fails_is_no_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What starts runs again, starts this one again; exit code 2 would end it."""

    def run(*_: object) -> None:
        raise SaveError("gs://bucket/run: 503 Service Unavailable")

    monkeypatch.setattr(train, "run", run)
    assert train.main([]) == 7
    assert capsys.readouterr().err == "segzero_jax.train: gs://bucket/run: 503 Service Unavailable\n"


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EROFS, 7), (errno.ENOSPC, 7), (errno.EIO, 7)])
def test_a_run_directory_that_is_another_s_or_full_is_one_line(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root, as whom tests may run, is refused nothing."""
    file = "runs/toy/.lock"

    def run(*_: object) -> None:
        raise OSError(number, os.strerror(number), file)

    monkeypatch.setattr(train, "run", run)
    assert train.main([]) == code
    expected = f"segzero_jax.train: [Errno {number}] {os.strerror(number)}: 'runs/toy/.lock'\n"
    assert capsys.readouterr().err == expected
    number, file = errno.ENOENT, "elsewhere"  # of which nobody knows why
    with pytest.raises(OSError, match="No such file"):
        train.main([])


def test_a_checkpoint_without_tokenizer_is_named(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((model_directory("toy") / name).read_bytes())
    assert train.main([f"--model.path={tmp_path}", f"--run.dir={tmp_path}/run", f"--data.dir={data_dir}"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert "tokenizer.json: no such file" in complaint
    assert len(complaint.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_evaluation_asks_of_every_picture_one_question_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked follows from data and configuration alone: a run that goes on asks the same."""

    class Split(list):
        def first(self, count: int) -> list[int]:
            return [0, 2, 1][:count]

    asked: list[list[str]] = []
    monkeypatch.setattr(train.evaluation, "evaluate_split", lambda examples, *_: asked.append(examples) or ({}, []))
    monkeypatch.setattr(train, "Patience", lambda *_, **__: nullcontext())
    config = configs.replace(Config(), **{"data.eval_splits": ["val"], "eval.examples": 2})
    job = SimpleNamespace(config=config, frame=None, pod=SimpleNamespace(from_first=lambda *_: ["val"]))
    evaluate = train.make_evaluation(job, [Split("abc")], None, Mock(), Mock(), Mock(), Mock())
    evaluate(0, None)
    assert asked == [["a", "c"]]


def test_a_second_run_does_not_mix_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert train.main([f"--run.dir={tmp_path}", "--reward.server=none"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
