import errno
import io
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboardX.proto import event_pb2
from test_tensorboard import events

from segzero_jax import config as configs
from segzero_jax import jsonl
from segzero_jax.config import Config
from segzero_jax.metrics import MetricsError, MetricsWriter, safe_name
from segzero_jax.progress import duration
from segzero_jax.run_dir import score

NUMBERS = {"giou": 0.5, "giou_low": 0.4, "giou_high": 0.6, "ciou": 0.5, "count": 3}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def writer(run_dir, **options):
    return MetricsWriter(run_dir, options.pop("total_steps", 10), options.pop("show_progress", False), **options)


def png(colour=(10, 200, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_step_is_one_line_of_strict_json(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write_step(1, {"kl": np.float32(0.5), "loss": jnp.float32(2.0), "reward/zero_std_groups": 3, "x": None})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there at once, not at the end
    assert json.loads(line) == {"step": 1, "kl": 0.5, "loss": 2.0, "reward/zero_std_groups": 3, "x": None}
    assert metrics.last_step == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32(jnp.nan)])
def test_a_number_that_is_not_finite_stops_the_step(tmp_path, value):
    metrics = writer(tmp_path)
    with pytest.raises(MetricsError, match=r"^step 1: kl=-?(nan|inf): expected a finite number"):
        metrics.write_step(1, {"loss": 1.0, "kl": value})
    with pytest.raises(MetricsError, match=r"evaluation of val at step 0: greedy giou=-?(nan|inf)"):
        metrics.write_evaluation(0, "val", {"greedy": {"giou": value}}, [])
    assert list(tmp_path.iterdir()) == []


def test_no_step_is_written_twice(tmp_path):
    metrics = writer(tmp_path)
    metrics.write_step(5, {})
    for step in (5, 4):
        with pytest.raises(MetricsError, match=f"^step {step}: .* already goes up to step 5; resume"):
            metrics.write_step(step, {})
    with pytest.raises(MetricsError, match="already goes up to step 5"):  # another process, the same directory
        writer(tmp_path).write_step(1, {})
    assert [row["step"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [5]


@settings(max_examples=25)
@given(data=st.data())
def test_a_run_cut_off_anywhere_and_resumed_ends_as_if_it_never_was(tmp_path_factory, data):
    """Killed after any byte of metrics.jsonl, resumed from any checkpoint that was before it."""
    folder = tmp_path_factory.mktemp("run")
    rows = {step: {"reward/mean": step / 3, "kl": None} for step in range(1, 7)}

    def train(restored=None):
        with writer(folder) as metrics:
            if restored is not None:
                metrics.truncate_after(restored)
            for step in range((restored or 0) + 1, 7):
                metrics.write_rollouts(step, [{"step": step, "text": "ü"}])
                metrics.write_evaluation(step, "val", {"greedy": NUMBERS}, [{"id": step}])
                metrics.write_step(step, rows[step])

    def content():
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl*")}

    train()
    whole = content()
    cut = data.draw(st.integers(0, len(whole["metrics.jsonl"])))
    left = whole["metrics.jsonl"][:cut]
    (folder / "metrics.jsonl").write_bytes(left)
    train(restored=data.draw(st.integers(0, left.count(b"\n"))))
    assert content() == whole


def test_a_line_that_a_crash_left_unfinished_is_cut_off(tmp_path):
    writer(tmp_path).write_step(1, {"kl": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kl"')
    writer(tmp_path).write_step(2, {"kl": 0.25})
    assert jsonl.read(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.25}]


def test_a_line_that_a_full_disk_did_not_take_comes_from_the_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsWriter(tmp_path, 3, show_progress=False) as writer:
        writer.write_step(1, {"loss": 1.0})
        with monkeypatch.context() as disk:
            disk.setattr(jsonl, "append_lines", full)
            with pytest.raises(OSError, match="No space left"):
                writer.write_step(2, {"loss": 2.0})
        saved = writer.recent()
        assert writer.recent(kept=[1]) == saved
    with MetricsWriter(tmp_path, 3, show_progress=False) as writer:
        assert writer.add_missing(saved)
        assert not writer.add_missing(saved)
        writer.write_step(3, {"loss": 3.0})
    # One that somebody has lost in the middle, too.
    whole = jsonl.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in whole] == [1, 2, 3]
    jsonl.write(tmp_path / "metrics.jsonl", [whole[0], whole[2]])
    with MetricsWriter(tmp_path, 3, show_progress=False) as writer:
        assert writer.add_missing(saved)
    assert jsonl.read(tmp_path / "metrics.jsonl") == whole


def test_the_lines_for_a_checkpoint_outlive_the_folder(tmp_path):
    with writer(tmp_path / "run") as metrics:
        metrics.write_step(1, {"kl": 0.5})
        metrics.write_evaluation(1, "val", {"greedy": NUMBERS}, [])
        saved = metrics.recent()
        (tmp_path / "run").rename(tmp_path / "away")
        assert metrics.recent(kept=[0]) == saved
    assert [row["giou"] for row in saved["evaluations"]] == [0.5]
    config = configs.replace(Config(), **{"train.keep_best": "kl"})
    assert score(config, tmp_path / "away", 1) == 0.5
    with pytest.raises(FileNotFoundError):
        score(config, tmp_path / "run", 1)


def test_an_evaluation_after_the_file_has_gone_brings_the_earlier_ones_back(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write_evaluation(0, "val", {"greedy": NUMBERS}, [])
        (tmp_path / "evaluations.jsonl").unlink()
        metrics.write_evaluation(1, "val", {"greedy": NUMBERS}, [])
    assert [row["step"] for row in jsonl.read(tmp_path / "evaluations.jsonl")] == [0, 1]


def test_what_lies_past_the_restored_step_is_forgotten_and_the_rest_kept(tmp_path):
    with writer(tmp_path) as metrics:
        for step in (0, 2, 10):
            metrics.write_evaluation(step, "held_out_x", {"greedy": NUMBERS, "sampled": NUMBERS}, [{"id": "a"}])
        for step in (1, 2, 3, 10):
            metrics.write_rollouts(step, [{"step": step}])
            metrics.write_step(step, {"kl": 0.0})
        metrics.truncate_after(2)
        assert metrics.last_step == 2
        metrics.write_step(3, {"kl": 1.0})
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl")}
    assert names == {
        *("metrics.jsonl", "evaluations.jsonl", "rollouts/1.jsonl", "rollouts/2.jsonl"),
        *("evaluations/0_held_out_x.jsonl", "evaluations/2_held_out_x.jsonl"),
    }
    assert [(row["step"], row["kl"]) for row in jsonl.read(tmp_path / "metrics.jsonl")] == [(1, 0), (2, 0), (3, 1)]
    modes = ("greedy", "sampled")
    found = [(row["step"], row["mode"]) for row in jsonl.read(tmp_path / "evaluations.jsonl")]
    assert found == [(step, mode) for step in (0, 2) for mode in modes]


@settings(max_examples=25)
@given(data=st.data())
def test_lines_that_a_copy_does_not_hold_yet_come_from_the_checkpoint(tmp_path_factory, data):
    """A machine vanishes; what is left is a copy of its files from some moment, and a checkpoint from a later one."""
    folder = tmp_path_factory.mktemp("run")
    copies = []
    with writer(folder) as metrics:
        for step in range(1, 7):
            metrics.write_step(step, {"reward/mean": step / 3, "kl": None})
            checkpoint = json.loads(json.dumps(metrics.recent()))
            copies.append({path.name: path.read_bytes() for path in folder.glob("*.jsonl")})
            if step % 2 == 0:
                metrics.write_evaluation(step, "val", {"greedy": NUMBERS, "sampled": NUMBERS}, [])
    copy = data.draw(st.sampled_from([{}, *copies]))
    for path in folder.glob("*.jsonl"):
        path.unlink()
    for name, content in copy.items():
        (folder / name).write_bytes(content)
    for _ in range(2):  # Again changes nothing.
        with writer(folder) as metrics:
            metrics.add_missing(checkpoint)
            metrics.truncate_after(6)
            assert metrics.recent() == checkpoint
        assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == copies[-1]


def test_with_its_folder_a_run_does_not_lose_which_checkpoint_is_the_best(tmp_path, monkeypatch):
    """By its line alone the best is known, however long ago that was."""
    monkeypatch.setattr("segzero_jax.metrics._RECENT", 20)  # lines of either kind
    first, second = tmp_path / "first", tmp_path / "second"
    with writer(first) as metrics:
        for step in range(1, 252):
            metrics.write_step(step, {"reward/mean": step % 40})
            if step % 5 == 0:
                numbers = {"giou": 1 / step}
                metrics.write_evaluation(step, "val", {"greedy": numbers}, [])
        assert [row["step"] for row in metrics.recent()["metrics"]] == list(range(232, 252)), "without any checkpoint"
        lines = metrics.recent([5, 39, 250])
    for key, expected in {"reward/mean": [5, 39, 10], "val/greedy/giou": [1 / 5, None, 1 / 250]}.items():
        config = configs.replace(Config(), **{"run.dir": str(second), "train.keep_best": key})
        with writer(second) as metrics:
            metrics.add_missing(json.loads(json.dumps(lines)))
            metrics.truncate_after(251)
        assert [score(config, second, step) for step in (5, 39, 250)] == expected
        steps = [row["step"] for row in jsonl.read(second / "metrics.jsonl")]
        assert steps == [5, 39, *range(232, 252)]


def test_an_evaluation_written_again_takes_the_place_of_the_first(tmp_path):
    metrics = writer(tmp_path)
    metrics.write_evaluation(0, "val", {"greedy": NUMBERS, "sampled": NUMBERS}, [{"id": "a"}])
    metrics.write_evaluation(0, "other", {"greedy": NUMBERS}, [])
    metrics.write_evaluation(0, "val", {"greedy": NUMBERS | {"giou": 0.7}, "sampled": NUMBERS}, [{"id": "b"}])
    rows = jsonl.read(tmp_path / "evaluations.jsonl")
    assert [(row["split"], row["mode"], row["giou"]) for row in rows] == [
        ("other", "greedy", 0.5),
        ("val", "greedy", 0.7),
        ("val", "sampled", 0.5),
    ]
    assert jsonl.read(tmp_path / "evaluations/0_val.jsonl") == [{"id": "b"}]


def test_tensorboard_gets_numbers_and_a_resumed_run_takes_over(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write_evaluation(0, "val", {"greedy": {"giou": 0.5, "ciou": None}}, [])
        for step in (1, 2):
            metrics.write_step(step, {"kl": 0.5, "x": None})
    with writer(tmp_path) as metrics:
        metrics.truncate_after(1)
        metrics.write_step(2, {"kl": 0.25})
    (file,) = (tmp_path / "tensorboard").iterdir()
    start = events(file)[1]
    assert (start.step, start.session_log.status) == (0, event_pb2.SessionLog.START), "copies of the old file are void"
    scalars = [(e.step, v.tag, v.simple_value) for e in events(file) for v in e.summary.value]
    assert scalars == [(1, "kl", 0.5), (0, "eval/val/greedy/giou", 0.5), (2, "kl", 0.25)]


def test_a_resumed_run_keeps_tensorboards_distances_in_time(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write_evaluation(0, "val", {"greedy": {"giou": 0.5}}, [])
        for step, seconds in ((1, 30.0), (2, 40.0), (3, 50.0)):
            metrics.write_step(step, {"kl": 0.5, "time/total": seconds})
        metrics.write_evaluation(2, "val", {"greedy": {"giou": 0.6}}, [])
    with writer(tmp_path) as metrics:
        metrics.truncate_after(3)
    (file,) = (tmp_path / "tensorboard").iterdir()
    walls = {(e.step, v.tag): e.wall_time for e in events(file) for v in e.summary.value}
    now = walls[3, "kl"]
    assert abs(now - file.stat().st_mtime) < 60
    assert [now - walls[step, "kl"] for step in (1, 2)] == pytest.approx([90.0, 50.0], abs=1e-3)
    giou = "eval/val/greedy/giou"
    assert (walls[0, giou], walls[2, giou]) == (walls[1, "kl"], walls[2, "kl"])


def test_a_log_file_gets_readable_lines_now_and_then(tmp_path):
    log = io.StringIO()
    with writer(tmp_path, total_steps=100, show_progress=True, stream=log) as metrics:
        metrics.message("the server says [bold]hello[/bold]")
        for step in range(1, 101):
            metrics.write_step(step, {"reward/mean": 2.345, "kl": 0.001, "reward/mask_iou": 0.5, "time/step": 4.0})
    lines = log.getvalue().splitlines()
    assert lines[0] == "the server says [bold]hello[/bold]"
    assert lines[1].startswith("step 1/100 | reward 2.35 | KL 0.0010 | mask IoU 0.500 | 4.0 s/step | about 6 min 36 s")
    assert lines[-1] == "step 100/100 | reward 2.35 | KL 0.0010 | mask IoU 0.500 | 4.0 s/step"
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines[1:]]
    assert steps == [1, *range(2, 101, 2)]
    assert "\x1b" not in log.getvalue()


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.write_step(1, {})
        metrics.write_step(2, {})
    terminal = Terminal()
    with writer(tmp_path, show_progress=True, stream=terminal) as metrics:
        metrics.truncate_after(2)
        metrics.message("resumed from [step 2]")
        metrics.write_step(3, {"reward/mean": 1.5})
    shown = terminal.getvalue()
    assert "resumed from [step 2]" in shown
    assert "step 3/10" in shown
    assert "reward 1.50" in shown
    assert shown.endswith("\x1b[?25h") or "\x1b[?25h" in shown  # the cursor is back


def test_without_progress_nothing_is_said(tmp_path, capsys):
    with writer(tmp_path) as metrics:
        metrics.message("hello")
        metrics.write_step(1, {})
    assert capsys.readouterr() == ("", "")


def test_pictures_are_stored_once_as_jpeg(tmp_path):
    metrics = writer(tmp_path)
    relative = metrics.write_image("toy/val/1", png())
    assert relative.startswith("images/")
    assert relative.endswith(".jpg")
    with Image.open(tmp_path / relative) as picture:
        assert (picture.format, picture.size) == ("JPEG", (6, 4))
        assert np.abs(np.asarray(picture, int) - (10, 200, 30)).max() < 6
    jpeg = (tmp_path / relative).read_bytes()
    (tmp_path / relative).write_bytes(b"written once")
    assert metrics.write_image("toy/val/1", png()) == relative
    assert (tmp_path / relative).read_bytes() == b"written once"
    as_it_is = metrics.write_image("photo", jpeg)
    assert re.fullmatch(r"images/photo-[0-9a-f]{8}\.jpg", as_it_is)
    assert (tmp_path / as_it_is).read_bytes() == jpeg


def test_one_id_in_two_splits_is_two_pictures(tmp_path):
    metrics = writer(tmp_path)
    earlier = tmp_path / "images/1.jpg"  # as runs were written before the digest
    earlier.parent.mkdir()
    earlier.write_bytes(b"of an earlier version")
    train, val = (metrics.write_image("1", png(colour)) for colour in ((200, 0, 0), (0, 0, 200)))
    for path, colour in ((train, (200, 0, 0)), (val, (0, 0, 200))):
        with Image.open(tmp_path / path) as picture:
            assert np.abs(np.asarray(picture, int) - colour).max() < 6
    assert earlier.read_bytes() == b"of an earlier version"


@given(left=st.text(max_size=300), right=st.text(max_size=300))
def test_any_id_has_a_file_name_of_its_own(left, right):
    name = safe_name(left)
    assert name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")
    assert len(name) <= 100
    if left != right:
        assert name != safe_name(right)


def test_ids_that_look_alike_have_different_files():
    assert len({safe_name(text) for text in ("a-b", "a/b", "a b", "A-B", "a_b", "a.b", "ä-b", "a-b ")}) == 8


@pytest.mark.parametrize("text", ["", ".", "..", "../../etc/passwd", "a/b", "A", "con\x00", "\ud800", "x" * 5000, "é"])
def test_awkward_ids_stay_in_the_folder(tmp_path, text):
    path = (tmp_path / writer(tmp_path).write_image(text, png())).resolve()
    assert path.parent == (tmp_path / "images").resolve()
    assert path.is_file()


@pytest.mark.parametrize(
    ("seconds", "spoken"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (485, "8 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7199, "1 h 59 min"),
        (12030, "3 h 20 min"),
    ],
)
def test_durations_are_spoken(seconds, spoken):
    assert duration(seconds) == spoken
