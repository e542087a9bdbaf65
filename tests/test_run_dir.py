"""Whether a directory is begun in, gone on with, or refused; and which of a run's steps is the best."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from segzero_jax import config as configs
from segzero_jax import jsonl, preflight, train
from segzero_jax.checkpoint import Checkpoints, StorageError
from segzero_jax.checkpoint_paths import complete_steps, locate
from segzero_jax.config import Config, ConfigError
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh
from segzero_jax.model.weights import CheckpointError
from segzero_jax.pods import ALONE, Pod
from segzero_jax.run_dir import (
    Beginning,
    begin,
    check_keep_best,
    check_same_run,
    checkpoint_due,
    complete,
    held,
    look,
    missing_splits,
    note_saved,
    open_run,
    refuse_moved,
    score,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configs.replace(
        Config(), **{"run.dir": str(tmp_path / "run"), "train.steps": 4, "data.eval_splits": ["val"]}
    )


def save(config: Config, *steps: int, lines: Mapping[str, Any] | None = None) -> None:
    directory = Path(config.run.checkpoint_dir or f"{config.run.dir}/checkpoints")
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(directory, keep=9) as checkpoints:
        for step in steps:
            state = TrainState({"w": jnp.ones(3)}, {}, jnp.int32(step))  # type: ignore[arg-type]
            checkpoints.save(step, state, {}, config, Identity("", None), lines)
        checkpoints.wait()


def evaluated(config: Config, *rows: tuple[int, str, str, float]) -> None:
    keys = ("step", "split", "mode", "giou")
    text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    Path(config.run.dir, "evaluations.jsonl").write_text(text)


def test_nothing_there_begins_and_resume_insists_on_a_checkpoint(config: Config) -> None:
    assert look(config, resume=False) == (Beginning(None, False), [])
    assert not Path(config.run.dir).exists(), "a look changes nothing"
    with pytest.raises(ConfigError, match="no checkpoint to resume from; start without --resume"):
        look(config, resume=True)


@pytest.mark.parametrize("given", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_a_run_in_a_bucket_is_refused_before_anything_is_written(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its metrics and rollouts would go into a folder ``gs:`` here, and with the machine."""
    monkeypatch.chdir(tmp_path)
    assert train.main([f"--run.dir={given}", "--run.checkpoint_dir=checkpoints"]) == 2
    said = capsys.readouterr()
    assert said.err == (
        f"segzero_jax.train: run.dir={given}: expected a folder on this machine's disk, got a URL; "
        "only run.checkpoint_dir may be in a bucket\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_which_another_process_trains_is_refused(
    config: Config, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that was given twice, or a job that was queued again while it ran."""
    arguments = [f"--run.dir={config.run.dir}", "--reward.server=none", f"--data.dir={data_dir}"]
    with held(config, begin(config, resume=False, pod=ALONE)):
        before = {path: path.read_bytes() for path in Path(config.run.dir).rglob("*") if path.is_file()}
        assert train.main([*arguments, "--train.steps=4", "--data.eval_splits=[val]"]) == 2
        assert {path: path.read_bytes() for path in Path(config.run.dir).rglob("*") if path.is_file()} == before
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"segzero_jax.train: {config.run.dir}: process {os.getpid()} on ")
    assert line.endswith(" works on this run; wait until it ends, or choose another folder")


def test_a_directory_that_cannot_be_made_is_one_line(config: Config, tmp_path: Path) -> None:
    """Checkpoints may go elsewhere, so this is the first that is written there."""
    (tmp_path / "file").write_text("")
    config = configs.replace(config, **{"run.dir": str(tmp_path / "file" / "run")})
    line = r"^run\.dir=.*/file/run: cannot be written to: Not a directory$"
    with pytest.raises(ConfigError, match=line), held(config, Beginning(None, done=False)):
        pytest.fail("it is held")


def test_a_run_that_another_process_has_made_meanwhile_is_not_made_again(config: Config) -> None:
    beginning = begin(config, resume=False, pod=ALONE)
    save(config, 2, 4)
    with (
        pytest.raises(StorageError, match="another process has saved or deleted there meanwhile"),
        held(config, beginning),
    ):
        pytest.fail("it is held")
    with held(config, begin(config, resume=False, pod=ALONE)):
        assert (Path(config.run.dir) / "config.yaml").exists()


@pytest.mark.parametrize("place", ["", "elsewhere"])
def test_a_run_that_was_cut_off_goes_on(config: Config, tmp_path: Path, place: str) -> None:
    config = configs.replace(config, **{"run.checkpoint_dir": place and str(tmp_path / place)})
    save(config, 1, 3)
    for resume in (False, True):
        assert look(config, resume) == (Beginning(3, False), [])
    longer = configs.replace(config, **{"train.steps": 9, "mesh": "2x2", "model.path": "moved"})
    assert look(longer, resume=False)[0] == Beginning(3, False)


def test_a_damaged_checkpoint_is_passed_over_in_one_line(config: Config) -> None:
    save(config, 1, 3)
    (file,) = Path(config.run.dir).glob("checkpoints/3/run/metadata")
    file.write_bytes(file.read_bytes()[:-1])
    beginning, (line,) = look(config, resume=False)
    assert beginning == Beginning(1, False)
    assert "checkpoints/3 is damaged (run/metadata: " in line
    assert line.endswith("): going on from step 1")


def test_all_steps_and_evaluations_are_the_end(config: Config) -> None:
    save(config, 4)
    evaluated(config, (0, "val", "greedy", 0.5))
    assert look(config, resume=False)[0] == Beginning(4, False), "its last evaluation is missing"
    evaluated(config, (4, "val", "greedy", 0.5))
    assert look(config, resume=False)[0] == Beginning(4, True)
    for steps, done in ((3, True), (5, False)):
        assert look(configs.replace(config, **{"train.steps": steps}), resume=False)[0] == Beginning(4, done)


@pytest.mark.parametrize("copied", ["nothing", "lines up to 3", "all"])
def test_a_run_that_is_done_is_told_on_a_machine_that_did_not_make_it(
    tmp_path: Path, copied: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    options = [f"--run.dir={run}", f"--run.checkpoint_dir={store}", "--train.steps=4", "--data.eval_splits=[]"]
    config = configs.load(overrides=[option.removeprefix("--") for option in options])
    rows = [{"step": step, "reward/mean": float(step)} for step in (1, 2, 3, 4)]
    evaluation = {"step": 2, "split": "val", "mode": "greedy", "giou": 0.5, "giou_low": 0.4, "giou_high": 0.6}
    save(config, 2, 4, lines={"metrics": rows[1:], "evaluations": [evaluation]})
    if copied != "nothing":
        open_run(config)
        (run / "config.yaml").write_text(f"# as it was\n{configs.to_yaml(config)}")
        lines = "".join(json.dumps(row) + "\n" for row in (rows if copied == "all" else rows[:3]))
        (run / "metrics.jsonl").write_text(lines)
    assert train.main(options) == 0
    out = capsys.readouterr().out
    assert f"{run}: all 4 steps are done, checkpoints are in {store}; raise train.steps to go on\n" in out
    assert f"report: {run}/report.html" in out
    assert (run / "report.html").is_file()
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lost = copied == "nothing"
    assert written == (rows[1:] if lost else rows)
    assert ("metrics.jsonl lacks the lines of 1 steps up to 4" in out) == lost
    assert f"mean reward: {'2.000 in step 2, 4.000 in step 4' if lost else '1.500 ± 0.500 in steps 1 to 2'}" in out
    assert "after 2 steps" in out
    assert "before" not in out, "that was lost"
    assert [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()] == [evaluation]
    assert (run / "config.yaml").read_text().startswith("# as it was") != lost
    assert list((run / "tensorboard").iterdir())
    assert train.main([*options, "--train.steps=3"]) == 0
    assert f"{run}: 4 steps are done, train.steps=3, checkpoints are in" in capsys.readouterr().out


def test_of_a_run_that_is_done_the_first_host_alone_writes_and_tells(config: Config) -> None:
    save(config, 4, lines={"metrics": [{"step": 4, "reward/mean": 1.0}], "evaluations": []})
    pod, said = Pod(), list[str]()
    for pod.index in (1, 0):
        complete(config, Beginning(4, done=True), pod, said.append)
        there = [Path(config.run.dir, name).exists() for name in ("metrics.jsonl", "config.yaml")]
        assert [*there, bool(said)] == [pod.first] * 3


def test_a_damaged_file_that_the_page_alone_reads_is_one_line_after_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = [f"--run.dir={run}", f"--run.checkpoint_dir={tmp_path}/store", "--train.steps=4", "--data.eval_splits=[]"]
    config = configs.load(overrides=[option.removeprefix("--") for option in options])
    save(config, 4, lines={"metrics": [{"step": step, "reward/mean": 1.0} for step in (1, 2, 3, 4)], "evaluations": []})
    (run / "rollouts").mkdir(parents=True)
    (run / "rollouts/4.jsonl").write_text("garbage\n")
    assert train.main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"segzero_jax.train: {run}/rollouts/4.jsonl:1: expected a JSON object on each line: ")
    assert len(said.err.splitlines()) == 1
    assert "mean reward: 1.000" in said.out


def test_another_run_is_refused_with_or_without_checkpoints(config: Config) -> None:
    other = configs.replace(config, **{"train.lr": 0.5, "reward.recipe": "seg_zero_soft", "train.steps": 99})
    run_dir = open_run(config)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert look(config, resume=False)[0] == Beginning(None, False), "killed before its first checkpoint"
    with pytest.raises(ConfigError, match=r"another configuration \(reward\.recipe, train\.lr differ\)"):
        look(other, resume=False)
    save(config, 1)
    with pytest.raises(CheckpointError, match=r"another configuration \(reward\.recipe, train\.lr differ\)"):
        look(other, resume=False)
    (run_dir / "config.yaml").unlink()
    assert look(config, resume=False)[0] == Beginning(1, False)


def test_a_run_that_goes_on_does_not_take_anothers_directory(config: Config, tmp_path: Path) -> None:
    """Its checkpoints lie elsewhere; what lies here would be cut, and pass for its own."""
    config = configs.replace(config, **{"run.checkpoint_dir": str(tmp_path / "elsewhere")})
    save(config, 3)
    run_dir = open_run(configs.replace(config, **{"train.lr": 0.5, "run.checkpoint_dir": ""}))
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"holds a run already, with another configuration \(train\.lr differs\)"):
        look(config, resume=False)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(config: Config, tmp_path: Path) -> None:
    """A disk that is not mounted yet: all that the run has written would be deleted."""
    config = configs.replace(config, **{"train.checkpoint_every": 2, "train.steps": 9})
    run_dir = open_run(config)

    def written(steps: int, failed: int = 0) -> None:
        rows = [{"step": step, "checkpoint/failed": failed} for step in range(1, steps + 1)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    written(4)
    assert look(config, resume=False)[0].step is None, "the save of step 2 may have been cut off"
    written(5)
    lost = r"/checkpoints: no checkpoint, though the run in run\.dir=.* has saved step 2; is the disk mounted\?"
    with pytest.raises(ConfigError, match=lost):
        look(config, resume=False)
    written(5, failed=1)
    assert look(config, resume=False)[0].step is None


def test_a_run_that_has_noted_a_save_is_not_begun_anew(config: Config) -> None:
    """One save, as on SIGTERM, leaves no trace in the lines."""
    run_dir = open_run(config)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert look(config, resume=False)[0] == Beginning(None, False)
    note_saved(run_dir, 1)
    with pytest.raises(ConfigError, match=r"no checkpoint, though the run in .* has saved step 1; is the disk mounted"):
        look(config, resume=False)
    save(config, 1)
    assert look(config, resume=False)[0] == Beginning(1, False, ())
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "metrics.jsonl").unlink()
    beginning = begin(config, resume=False, pod=ALONE)
    with held(config, beginning):
        (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert look(config, resume=False)[0] == Beginning(None, False), "the note was an earlier run's"
    for content in (b"", b"3", b"{}"):
        (run_dir / "saved.json").write_bytes(content)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        assert look(config, resume=False)[0] == Beginning(None, False)


def test_of_two_places_the_newer_checkpoints_are_the_run_s(config: Config, tmp_path: Path) -> None:
    """They were brought elsewhere, and the run went on there; the old ones were left where they were."""
    moved = configs.replace(config, **{"run.checkpoint_dir": str(tmp_path / "disk")})
    save(config, 1, 2)
    save(moved, 2, 3)
    run_dir = open_run(moved)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert locate(run_dir) == (epath.Path(tmp_path / "disk"), None)
    assert look(moved, resume=False)[0].step == 3
    before = f"its newest checkpoint is of step 2, the run in run.dir={run_dir} has one of step 3 in {tmp_path}/disk"
    for check in (check_same_run, lambda config: look(config, resume=False)):
        with pytest.raises(ConfigError, match=re.escape(before)):
            check(config)
    # A copy names the other run's places; what that has done since is not its own.
    copy = configs.replace(config, **{"run.dir": str(shutil.copytree(run_dir, tmp_path / "copy"))})
    assert look(copy, resume=False)[0].step == 2
    shutil.rmtree(tmp_path / "disk/3")
    assert locate(run_dir) == (epath.Path(run_dir / "checkpoints"), None)
    assert look(config, resume=False)[0].step == 2
    shutil.rmtree(tmp_path / "disk")
    assert locate(run_dir) == (epath.Path(run_dir / "checkpoints"), None)


@pytest.mark.parametrize("error", [StorageError, ConfigError])
def test_an_earlier_place_that_cannot_be_read_any_more_does_not_stop_a_run(
    config: Config, tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bucket may be gone, or the package that reads buckets."""
    gone = epath.Path(tmp_path / "gone")
    open_run(configs.replace(config, **{"run.checkpoint_dir": str(gone)}))
    save(config, 1)

    def read(directory: epath.Path) -> list[int]:
        if directory == gone:
            raise error("cannot be read")
        return complete_steps(directory)

    monkeypatch.setattr("segzero_jax.run_dir.complete_steps", read)
    assert look(config, resume=False)[0].step == 1


def test_a_check_that_reads_no_arrays_knows_another_run_by_its_checkpoints_alone(config: Config) -> None:
    """Like a start, it passes over a damaged one."""
    save(config, 1, 3)
    other = configs.replace(config, **{"train.lr": 0.5})
    with pytest.raises(CheckpointError, match=r"another configuration \(train\.lr differs\)"):
        check_same_run(other)
    (file,) = Path(config.run.dir).glob("checkpoints/3/run/metadata")
    file.write_bytes(file.read_bytes()[:-1])
    check_same_run(config)
    with pytest.raises(CheckpointError, match=r"another configuration \(train\.lr differs\)"):
        check_same_run(other)


def test_a_full_disk_does_not_undo_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint may be in a bucket."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl, "replace", full)
    note_saved(tmp_path, 1)


def test_the_configuration_of_a_run_that_was_moved_is_no_preset_for_its_old_place(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = open_run(config)
    preset = run_dir / "config.yaml"
    refuse_moved(config, str(preset))
    (run_dir / "metrics.jsonl").touch()
    refuse_moved(config, str(preset))
    monkeypatch.chdir(tmp_path)
    refuse_moved(config, "run/config.yaml")
    there = run_dir.rename(tmp_path / "moved")
    said = f"--config={there}/config.yaml: its run.dir={run_dir} is not the folder of the run that it is in; "
    for main in (train.main, preflight.main):
        assert main([f"--config={there}/config.yaml"]) == 2
        assert said in capsys.readouterr().err
    assert not run_dir.exists()
    refuse_moved(config, None)
    refuse_moved(config, "configs/toy.yaml")


def test_what_was_due_is_what_was_due_then(config: Config) -> None:
    """A start that asks for saves more often, and ends before it has cut the lines of the one before."""
    first = configs.replace(config, **{"train.checkpoint_every": 1000, "train.steps": 900})
    with held(first, begin(first, resume=False, pod=ALONE)):
        rows = "".join(json.dumps({"step": step, "checkpoint/failed": 0}) + "\n" for step in range(1, 301))
        Path(config.run.dir, "metrics.jsonl").write_text(rows)
    second = configs.replace(first, **{"train.checkpoint_every": 50})
    for _ in range(2):
        with held(second, begin(second, resume=False, pod=ALONE)):
            pass  # no reward server


def test_a_best_of_the_last_step_alone_is_no_reason_not_to_go_on(config: Config) -> None:
    config = configs.replace(config, **{"train.keep_best": "val/greedy/giou"})
    with pytest.raises(ConfigError, match="is measured after the last step alone"):
        look(config, resume=False)
    save(config, 2)
    assert look(config, resume=False)[0].step == 2


def test_checkpoints_that_are_elsewhere_are_named(config: Config, tmp_path: Path) -> None:
    run_dir = open_run(config)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    save(config, 3)
    moved = configs.replace(config, **{"run.checkpoint_dir": str(tmp_path / "elsewhere")})
    with pytest.raises(ConfigError, match=r"those of the run in run\.dir=.*/run are in .*/run/checkpoints, to step 3;"):
        look(moved, resume=False)


def test_only_the_splits_without_numbers_are_evaluated_again(config: Config) -> None:
    config = configs.replace(config, **{"data.eval_splits": ["val", "ReasonSeg/test"]})
    run_dir = open_run(config)
    assert missing_splits(config, run_dir, 0) == ["val", "ReasonSeg-test"]
    evaluated(config, (0, "val", "greedy", 0.5))
    assert missing_splits(config, run_dir, 0) == ["ReasonSeg-test"]
    assert missing_splits(config, run_dir, 2) == []
    twice = configs.replace(config, **{"data.eval_splits": ["val", "val"]})
    assert missing_splits(twice, run_dir, config.train.steps) == ["val"], "a split is evaluated once"


def test_the_best_step_by_an_evaluation_or_a_metric(config: Config) -> None:
    run_dir = open_run(config)
    evaluated(config, (2, "val", "sampled", 0.1), (2, "val", "greedy", 0.75))
    (run_dir / "metrics.jsonl").write_text('{"step": 2, "reward/mean": 3.5}\n{"step": 3, "reward/mean": null}\n')
    for name, expected in {
        "val/greedy/giou": [None, 0.75, None],
        "reward/mean": [None, 3.5, None],
        "no/such/number": [None, None, None],
        "": [None, None, None],
    }.items():
        named = configs.replace(config, **{"train.keep_best": name})
        assert [score(named, run_dir, step) for step in (1, 2, 3)] == expected
    # A resume has asked more questions: the earlier number, over easier ones perhaps, is not compared with it.
    more = {"step": 3, "split": "val", "mode": "greedy", "giou": 0.5, "count": 16}
    jsonl.append(run_dir / "evaluations.jsonl", more)
    named = configs.replace(config, **{"train.keep_best": "val/greedy/giou"})
    assert [score(named, run_dir, step) for step in (1, 2, 3)] == [None, None, 0.5]


def test_steps_that_may_prove_the_best_are_saved(config: Config) -> None:
    config = configs.replace(config, **{"train.steps": 9, "train.checkpoint_every": 4, "eval.every": 3})
    due = lambda config: [step for step in range(1, 10) if checkpoint_due(config, step)]  # noqa: E731
    assert due(config) == [4, 8, 9]
    assert due(configs.replace(config, **{"train.keep_best": "reward/mean"})) == [4, 8, 9]
    best = configs.replace(config, **{"train.keep_best": "val/greedy/giou"})
    assert due(best) == [3, 4, 6, 8, 9]
    assert due(configs.replace(best, **{"eval.every": 1})) == list(range(1, 10))


SPLITS = {"data.eval_splits": ["val", "ReasonSeg/test"], "eval.every": 2}
NAMES = (
    "expected SPLIT/MODE/NUMBER of an evaluation, of data.eval_splits=[val, ReasonSeg/test], or a key of "
    "metrics.jsonl, "
)
LAST = "is measured after the last step alone with eval.every={}, expected eval.every from 1 to below train.steps=4"
SAM2 = "is measured by SAM 2, expected reward.server=local or host:port, got none"
MISTYPED = {
    "eval/val/greedy/giou": (SPLITS, NAMES + "did you mean 'val/greedy/giou'?"),  # TensorBoard's name
    "val/greedy/gIoU": (SPLITS, NAMES + "did you mean 'val/greedy/giou'?"),
    "tset/sampled/box_accuracy": (SPLITS, NAMES + "did you mean 'val/sampled/box_accuracy'?"),
    "giou": (SPLITS, NAMES + "did you mean 'val/greedy/giou'?"),
    "best": (SPLITS, NAMES + "such as 'val/greedy/giou'"),
    "the best": (SPLITS | {"data.eval_splits": []}, NAMES.replace("val, ReasonSeg/test", "") + "such as 'reward/mean'"),
    "reward/acuracy": (SPLITS, NAMES + "did you mean 'reward/accuracy'?"),
    # The recipe has no such component.
    "reward/box_iou": (SPLITS, NAMES + "did you mean 'reward/mask_iou'?"),
    "heldout_pairs/greedy/giou": (SPLITS, NAMES + "did you mean 'val/greedy/giou'?"),
    "ReasonSeg/test/greedy/ciou": (SPLITS | {"reward.server": "none"}, SAM2),
    "reward/mask_iou": (SPLITS | {"reward.server": "none"}, SAM2),
    "val/greedy/giou": (SPLITS | {"eval.every": 0}, LAST.format(0)),
    "ReasonSeg-test/sampled/giou": (SPLITS | {"eval.every": 4}, LAST.format(4)),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_best_that_would_never_be_measured_is_refused_at_the_start(config: Config, name: str) -> None:
    changes, expected = MISTYPED[name]
    config = configs.replace(config, **changes, **{"train.keep_best": name})
    with pytest.raises(ConfigError) as error:
        begin(config, resume=False, pod=ALONE)
    assert str(error.value) == f"train.keep_best={name}: {expected}"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("", {}),
        ("val/greedy/giou", {}),
        ("val/sampled/ciou_low", {}),
        ("val/greedy/reward", {"reward.server": "none"}),
        ("ReasonSeg/test/greedy/n_acc", {}),
        ("ReasonSeg-test/greedy/n_acc", {}),
        ("val/greedy/box_accuracy", {"reward.server": "none"}),
        ("reward/mean", {"data.eval_splits": []}),
        ("reward/accuracy", {"eval.every": 0}),
        ("reward/mask_iou", {}),
        ("mask_iou/mean", {"reward.mask_iou_weight": 0.0}),
        ("reward/mask_iou", {"reward.recipe": "sam_r1", "reward.mask_iou_weight": 0.0}),
        ("reward/point_l1", {"reward.recipe": "seg_zero_soft", "reward.server": "none"}),
        ("entropy", {}),
        ("time/goodput", {}),
    ],
)
def test_a_best_that_will_be_measured_is_taken(config: Config, name: str, changes: dict[str, Any]) -> None:
    check_keep_best(configs.replace(config, **SPLITS | changes | {"train.keep_best": name}))
