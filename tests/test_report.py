import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from fake_run import SPLITS, write_fake_run
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from segzero_jax import jsonl, overlay, rewards
from segzero_jax.progress import duration
from segzero_jax.report import RunError, cards, charts, evaluations, write_report
from segzero_jax.report.__main__ import main
from segzero_jax.report.cases import Case, choose, rollouts_section
from segzero_jax.report.charts import Series
from segzero_jax.report.curves import reward_section
from segzero_jax.report.gallery import Shown, build_gallery
from segzero_jax.report.markup import MINUS, NOTHING, label, show
from segzero_jax.report.run import ends, read_run, reward_maxima

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, and the text, also by the class of its nearest element."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(source)
        self.close()
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else None, data))

    def words(self, kind=None):
        """All text outside the style sheet; with ``kind`` only that directly in elements of the class."""
        return " ".join(t for at, t in self.text if at and at[0] != "style" and (kind is None or at[1] == kind))

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def sections(self):
        return [attrs["id"] for attrs in self.all("section")]


def report(run):
    return Page(write_report(run).read_text())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "fine"
    write_fake_run(run, steps=24, evaluated=(0, 12, 24))
    return run


@pytest.fixture(scope="module")
def page(run_dir):
    return report(run_dir)


@pytest.fixture
def copied(run_dir, tmp_path):
    return shutil.copytree(run_dir, tmp_path / "copy")


def rows(run, name):
    return jsonl.read(run / name)


def test_every_part_is_there_and_every_link_leads_to_one(page):
    assert page.sections == ["reward", "cases", "rollouts", "held-out", "signals", "time"]
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{name}" for name in page.sections]
    assert page.words().split()[0] == "fine"


def test_nothing_is_fetched_and_nothing_runs(run_dir, page):
    source = (run_dir / "report.html").read_text()
    assert "http://" not in source
    assert "https://" not in source
    assert not re.search(r"@import|url\(|javascript:", source)
    assert not {"script", "iframe", "link", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "xlink:href", "data", "action"):
            assert attrs.get(name, "#").startswith(("data:image/jpeg;base64,", "#")), (tag, name)
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert (run_dir / "report.html").stat().st_size < 5_000_000


def test_the_headline_says_what_the_files_say(run_dir, page):
    reward = [row["reward/mean"] for row in rows(run_dir, "metrics.jsonl")]
    first, last = np.array(reward[:10]), np.array(reward[-10:])
    errors = [part.std(ddof=1) / 10**0.5 for part in (first, last)]
    change = (last.mean() - first.mean()) / np.hypot(*errors)
    words = page.words()
    assert f"{first.mean():.2f} → {last.mean():.2f}" in " ".join(words.split())
    assert f"first 10 steps ±{show(errors[0], 2)} → last 10 steps ±{show(errors[1], 2)}" in words
    assert f"{show(change, 2)} standard errors" in words
    assert "(of 8 at most)" in words
    for row in rows(run_dir, "evaluations.jsonl"):
        if row["step"] in (0, 24) and row["split"] == SPLITS[0]:
            assert f"interval {row['giou_low']:.3f}{NOTHING}{row['giou_high']:.3f}" in words


@pytest.mark.parametrize("scored", [1, 2])
def test_the_headline_counts_the_steps_that_were_scored(copied, scored):
    found = rows(copied, "metrics.jsonl")
    unscored = [row | {"reward/mean": row["reward/mean"] if row["step"] in (7, 9)[:scored] else None} for row in found]
    jsonl.write(copied / "metrics.jsonl", unscored)
    tile = report(copied).words("more")
    assert ("step 7, the only one with scores" in tile) == (scored == 1)
    assert ("first step → last step" in tile) == (scored == 2)


@pytest.mark.parametrize(("gain", "colour"), [(2.0, "up"), (0.5, ""), (-0.5, ""), (-2.0, "down")])
def test_a_change_of_the_reward_has_a_colour_where_it_is_more_than_noise(copied, gain, colour):
    """Twice its standard error, which is 0.47 here."""
    for folder in ("rollouts", "evaluations"):
        shutil.rmtree(copied / folder)
    (copied / "evaluations.jsonl").unlink()
    means = {step: 3 + (-1) ** step + gain * (step > 12) for step in range(6, 25)}
    found = [row for row in rows(copied, "metrics.jsonl") if row["step"] in means]
    jsonl.write(copied / "metrics.jsonl", [row | {"reward/mean": float(means[row["step"]])} for row in found])
    page = report(copied)
    (change,) = [attrs["class"] for attrs in page.all("span") if attrs.get("class") in ("up", "down", "")]
    assert change == colour
    assert "by GRPO. 24 steps, " in page.words(), "though the lines of five are lost"


@pytest.mark.parametrize(
    ("half", "colours"),
    [
        # Of the difference of two numbers, the half widths add up as squares: 0.141 and 0.212.
        (0.1, ["+0.250", "", f"{MINUS}0.125 +0.000 +0.000"]),
        (0.08, ["+0.250", f"{MINUS}0.125", "+0.000 +0.000"]),
        (0.2, ["", "", f"+0.250 {MINUS}0.125 +0.000 +0.000"]),
        (None, ["", "", f"+0.250 {MINUS}0.125 +0.000 +0.000"]),
    ],
)
def test_a_change_of_an_evaluation_has_its_sign_and_a_colour_where_it_is_more_than_noise(copied, half, colours):
    found = rows(copied, "evaluations.jsonl")
    giou = {"greedy": (0.5, 0.75), "sampled": (0.75, 0.625)}
    for row in found:
        row["giou"] = giou[row["mode"]][row["step"] == 24] if row["split"] == SPLITS[0] else 0.25
        row["giou_low"], row["giou_high"] = (None, None) if half is None else (row["giou"] - half, row["giou"] + half)
    jsonl.write(copied / "evaluations.jsonl", found)
    page = Page(evaluations.gains(read_run(copied)))
    assert [page.words(colour) for colour in ("up", "down", "")] == colours


def test_the_evaluation_table_holds_every_row(run_dir, page):
    source = (run_dir / "report.html").read_text()
    first, everything = (
        [tuple(cell.strip() for cell in re.findall(r"<td[^>]*>([^<]*)", line)) for line in table.split("<tr>")[2:]]
        for table in re.findall(r'<table class="evaluations">.*?</table>', source)
    )
    expected = {}
    for row in rows(run_dir, "evaluations.jsonl"):
        numbers = [f"{row[key]:.3f}" for key in ("giou", "ciou", "box_accuracy", "format_rate", "reward")]
        expected[(row["split"], row["mode"], str(row["step"]), *numbers, str(row["count"]))] = row["step"]
    assert set(everything) == expected.keys()
    assert set(first) == {line for line, step in expected.items() if step != 12}
    assert (len(everything), len(first)) == (12, 8)


def test_all_time_of_the_run_is_accounted_for(run_dir, page):
    """Every line's seconds, and those after the last line: an evaluation of 11 s and a checkpoint of 1.5 s."""
    measured = rows(run_dir, "metrics.jsonl")
    total = sum(row["time/total"] for row in measured) + 12.5
    spent = lambda phase: sum(row.get(f"time/{phase}", 0.0) for row in measured)  # noqa: E731
    words = " ".join(page.words().split())
    for phase, name in (("rollout", "rollout"), ("reward_wait", "waiting for rewards"), ("update", "update")):
        seconds = spent(phase)
        assert f"{name} {duration(seconds)} {seconds / total:.1%} {seconds / 24:.2f} s" in words, name
    assert f"evaluation 22 s {22 / total:.1%}" in words
    assert f"checkpoint 4 s {(4 * 0.7 + 1.5) / total:.1%}" in words
    assert f"in all {duration(total)} {spent('step') / 24:.2f} s" in words
    goodput = sum(map(spent, ("rollout", "reference", "update"))) / total
    assert f"Of {duration(total)} in all, {goodput:.0%} went into rollout, reference and update" in words
    assert f"waited for data for {spent('data') / spent('step'):.1%} of their time" in words
    assert "Restarts cost" not in words


def test_seconds_that_a_line_holds_are_not_added_from_the_clock(copied):
    clock = json.loads((copied / "clock.json").read_text())
    (copied / "clock.json").write_text(json.dumps(clock | {"after_step": 23}))
    total = sum(row["time/total"] for row in rows(copied, "metrics.jsonl"))
    assert f"Of {duration(total)} in all" in report(copied).words()
    (copied / "clock.json").write_text("{")
    with pytest.raises(RunError, match=r"clock\.json: not JSON"):
        write_report(copied)


def test_what_went_wrong_is_on_one_time_line(tmp_path):
    write_fake_run(tmp_path / "run", steps=20, evaluated=(0,), questions=1, troubled=True)
    page = report(tmp_path / "run")
    assert page.sections[0] == "events"
    words = " ".join(page.words().split())
    for said in (
        "alarm: no spread No group's rewards differed, so nothing was learnt. Steps 8 to 9.",
        "it changed no weight. Steps 3 to 4, 7.",
        "left out of the loss. Step 5.",
        "A checkpoint could not be written. Steps 5, 10.",
        "Restarts cost 20 s of work that had to be done again.",
    ):
        assert said in words
    assert "alarm: one length" not in words
    bars = [attrs for attrs in page.all("rect") if attrs.get("class") == "span"]
    assert len(bars) == 2 * (1 + 2 + 1 + 2)
    wide = {}  # by row of the first drawing: first and last pixel
    for bar in bars[:6]:
        wide.setdefault(bar["y"], []).append((float(bar["x"]), float(bar["x"]) + float(bar["width"])))
    (alarm,), (skipped, again), (missing,), (saved, later) = wide.values()
    step = (later[0] - saved[0]) / 5
    assert alarm[1] - alarm[0] == pytest.approx(2 * step, rel=0.01)
    assert skipped[0] == pytest.approx(missing[0] - 2 * step, abs=0.2)
    assert again[1] == pytest.approx(alarm[0], abs=0.2)


@pytest.mark.parametrize(("steps", "first", "last"), [([1], 1, 1), ([1, 2], 2, 2), (range(1, 9001), 9000, 9000)])
def test_the_shortest_stretch_can_be_seen_and_lies_in_the_drawing(steps, first, last):
    drawing = charts.span_chart(list(steps), [("x", [(first, last)])], "d", charts.Size(350, 66))
    x, width = (float(re.search(rf'class="span".* {key}="([^"]+)"', drawing).group(1)) for key in ("x", "width"))
    assert width >= 3
    assert 12 <= x < x + width <= 340.1


def test_every_metric_has_its_curve_with_its_last_value(run_dir, page):
    last = rows(run_dir, "metrics.jsonl")[-1]
    drawn = {attrs["aria-label"].partition(":")[0]: attrs["aria-label"] for attrs in page.all("svg") if "role" in attrs}
    for key, title in (("kl", "KL to the reference"), ("entropy", "Entropy"), ("grad_norm", "Gradient norm")):
        assert drawn[title].endswith(f"{show(last[key])} at step 24")
    for component in ("thinking format", "segmentation format", "accuracy", "non repeat", "mask IoU"):
        key = "reward/" + component.lower().replace(" ", "_")
        assert drawn[component].endswith(f"{show(last[key])} at step 24")
    assert {"Mean reward", "Response length", "Sampler gap", "Groups without spread", "Finished"} <= drawn.keys()
    assert not {"Clipped", "Learning rate"} & drawn.keys(), "they never change here"


def test_what_changes_only_in_some_runs_is_drawn_there(tmp_path):
    write_fake_run(tmp_path / "run", steps=3, evaluated=(), questions=1)
    file = tmp_path / "run/metrics.jsonl"
    changed = [
        row | {"lr": 1e-4 / row["step"], "clip_fraction": 0.1, "kl_old": 0.01}
        for row in rows(tmp_path / "run", file.name)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in changed))
    titles = [attrs["aria-label"].partition(":")[0] for attrs in report(tmp_path / "run").all("svg") if "role" in attrs]
    assert {"Learning rate", "KL within a step"} <= set(titles)
    assert "Clipped" not in titles


def test_the_gallery_shows_the_right_pictures_with_the_right_marks(run_dir, page):
    """Most improved by IoU comes first; its two pictures are drawn here from the files and compared."""
    before, after = (
        {(s, r["id"]): r for s in SPLITS for r in rows(run_dir, f"evaluations/{n}_{s}.jsonl")} for n in (0, 24)
    )
    best = max(after, key=lambda key: after[key]["iou"] - before[key]["iou"])
    pictures = page.all("img")
    for shown, row in zip(pictures, (before[best], after[best]), strict=False):
        sides = [
            overlay.Marks(
                [item["box"] for item in row[objects]],
                [point for item in row[objects] for point in item["points"]],
                overlay.decode_mask(row[mask]),
            )
            for objects, mask in (("objects", "mask"), ("target_objects", "target_mask"))
        ]
        with Image.open(run_dir / row["image"]) as picture:
            expected = overlay.draw(picture, *sides, int(shown["width"]))
        assert shown["src"] == overlay.data_uri(expected)
        assert f"IoU {row['iou']:.3f}" in page.words("score")
    words = page.words()
    assert [words.count(kind + "  · ") for kind in ("Most improved", "Typical", "Worst")] == [2, 2, 2]
    group = [row for row in rows(run_dir, "rollouts/24.jsonl") if "image" in row]
    assert len(pictures) == 2 * 6 + len(group)
    for row in group:
        sign = f"{row['advantage']:+.2f}".replace("-", MINUS)
        assert f"advantage {sign}" in words
        assert html.unescape(row["text"].split("<think>")[1].split("</think>")[0]) in words


def test_every_picture_opens(page):
    for attrs in page.all("img"):
        with Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2]))) as picture:
            assert picture.size == (int(attrs["width"]), int(attrs["height"]))
        assert attrs["alt"]


ATTACK = "</style></p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<think>"


def poison(path, keys):
    found = jsonl.read(path)
    for row in found:
        row.update(dict.fromkeys(keys, ATTACK))
        if isinstance(row.get("components"), dict):
            row["components"][ATTACK] = 1.0
    jsonl.write(path, found)


def test_text_of_a_run_is_never_markup(copied):
    for path in [*copied.glob("evaluations/*.jsonl"), *copied.glob("rollouts/*.jsonl")]:
        poison(path, ("text", "question", "solution", "length", "sample"))
    poison(copied / "evaluations.jsonl", ("mode", "count"))
    metrics = rows(copied, "metrics.jsonl")
    jsonl.write(
        copied / "metrics.jsonl",
        [row | {ATTACK: 1.0, f"reward/{ATTACK}": 2.0, f"alarm/{ATTACK}": 1} for row in metrics],
    )
    jsonl.write(copied / "metrics.jsonl", [row | {f"time/{ATTACK}": 0.1} for row in rows(copied, "metrics.jsonl")])
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["data"]["name"] = config["reward"]["mask_iou_weight"] = ATTACK
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    renamed = copied.rename(copied.with_name("<script>alert(3)<"))
    page = report(renamed)
    assert page.all("script") == []
    assert [attrs for attrs in page.all("img") if not attrs["src"].startswith("data:")] == []
    assert not [attrs for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.words("answer").count("alert(1)") >= 2 * 6  # shown as text, whole
    assert ATTACK in page.words("answer")
    assert page.words("question").count(ATTACK) == 7


def set_key(run, section, key, value):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def set_recipe(run, recipe):
    set_key(run, "reward", "recipe", recipe)


def without_thinking(path):
    found = jsonl.read(path)
    jsonl.write(path, [row | {"text": row["text"].partition("</think>")[2]} for row in found])
    return [row["text"].removeprefix("<answer>").removesuffix("</answer>") for row in jsonl.read(path)]


def test_an_answer_without_reasoning_is_in_form_where_none_is_asked_for(copied):
    note = "Not in the form asked for:"
    responses = len(report(copied).words("answer").split("bbox_2d")) - 1
    assert report(copied).words("note").count(note) == 0
    set_recipe(copied, "seg_zero_no_thinking")
    assert report(copied).words("note").count(note) == responses
    said = [text for path in copied.glob("rollouts/*.jsonl") for text in without_thinking(path)]
    said += [text for path in copied.glob("evaluations/*.jsonl") for text in without_thinking(path)]
    page = report(copied)
    assert page.words("note").count(note) == 0
    assert "thought" not in {attrs.get("class") for attrs in page.all("p")}
    shown = [data for at, data in page.text if at == ("p", "answer")]
    assert len(shown) == responses
    assert set(shown) <= set(said), "without the tags"
    set_recipe(copied, "vision_reasoner")
    assert report(copied).words("note").count(note) == responses


@pytest.mark.parametrize("recipe", sorted(rewards.RECIPES))
def test_every_component_is_told_in_words_that_fit_its_recipe(copied, recipe):
    set_recipe(copied, recipe)
    names = rewards.component_names(recipe, True)
    metrics = rows(copied, "metrics.jsonl")
    jsonl.write(copied / "metrics.jsonl", [row | {f"reward/{name}": 0.5 for name in names} for row in metrics])
    source = html.unescape(write_report(copied).read_text())
    for name in names:
        title = name.replace("_", " ")
        (caption,) = re.findall(
            rf"<h3>{title}</h3>.*?<figcaption>(.*?)</figcaption>", source, re.IGNORECASE | re.DOTALL
        )
        assert re.match(r"(?! *At most)[^.]+\.", caption), caption
        assert ("by more than half" in caption) == (name == "box_iou" and recipe != "seg_zero_soft_accuracy")
        assert ("over 840 px" in caption) == (name in ("box_l1", "point_l1") and recipe == "seg_zero_soft_accuracy")


@pytest.mark.parametrize("name", ["box_iou", "answer_format"])
def test_a_reward_of_one_s_own_has_no_words_of_a_recipe(copied, name):
    set_recipe(copied, "seg_zero_strict")
    set_key(copied, "reward", "functions", [f"my_rewards:{name}"])
    metrics = rows(copied, "metrics.jsonl")
    jsonl.write(copied / "metrics.jsonl", [row | {f"reward/{name}": 0.5} for row in metrics])
    source = html.unescape(write_report(copied).read_text())
    (caption,) = re.findall(rf"<h3>{label(name)}</h3>.*?<figcaption>(.*?)</figcaption>", source, re.DOTALL)
    assert caption == ""


def test_a_picture_outside_the_run_is_not_shown(copied, tmp_path):
    Image.new("RGB", (200, 200), "red").save(tmp_path / "secret.jpg")
    (copied / "images/broken.jpg").write_bytes(b"\xff\xd8 no picture")
    images = ("../secret.jpg", str(tmp_path / "secret.jpg"), "images/broken.jpg", "images/none.jpg", None, "images")
    for path in copied.glob("evaluations/*.jsonl"):
        found = jsonl.read(path)
        jsonl.write(path, [row | {"image": images[i % len(images)]} for i, row in enumerate(found)])
    page = report(copied)
    assert len(page.all("img")) == 4  # the training group alone
    assert page.words("missing").count("picture missing") == 12


@pytest.mark.parametrize(
    "mask", [None, 3, {}, {"height": 4, "width": 4, "counts": "zz"}, {"height": 1, "width": 1, "counts": "01"}]
)
def test_masks_that_cannot_be_drawn_are_left_out(copied, mask):
    for path in copied.glob("evaluations/*.jsonl"):
        odd = {"mask": mask, "objects": [{"box": [1, 2]}, None, {"box": [1, 2, 3, 4], "points": [["a", 1]]}]}
        jsonl.write(path, [row | odd for row in jsonl.read(path)])
    assert len(report(copied).all("img")) == 16


@pytest.mark.parametrize(
    ("made", "sections"),
    [
        ({"steps": 0, "evaluated": (), "planned": 9}, []),
        ({"steps": 0, "evaluated": (0,), "planned": 9}, ["cases", "held-out"]),
        ({"steps": 1, "evaluated": ()}, ["reward", "rollouts", "signals", "time"]),
        (
            {"steps": 2, "evaluated": (0, 2), "questions": 1},
            ["reward", "cases", "rollouts", "held-out", "signals", "time"],
        ),
        (
            {"steps": 3, "evaluated": (0, 3), "masks": False},
            ["reward", "cases", "rollouts", "held-out", "signals", "time"],
        ),
        ({"steps": 3, "evaluated": (0,), "planned": 9}, ["reward", "cases", "rollouts", "held-out", "signals", "time"]),
    ],
    ids=["nothing", "before the first step", "one step", "one question", "no masks", "in progress"],
)
def test_a_run_with_less_in_it_has_a_shorter_page(tmp_path, made, sections):
    write_fake_run(tmp_path / "run", **made)
    page = report(tmp_path / "run")
    assert page.sections == sections
    words = page.words()
    if "planned" in made:
        state = f"{made['steps']} of 9 steps, still running or stopped early"
        assert (state if made["steps"] else "No step yet") in words
    if made["evaluated"] == (0,):
        assert "Answers at step 0" in words
        assert "Best" in words
        assert "Most improved" not in words
    if not made.get("masks", True):
        assert "box accuracy, greedy, val" in words
        assert "IoU 0." not in words


def test_unmeasured_and_odd_values_do_not_stop_the_page(copied):
    found = rows(copied, "metrics.jsonl")
    for index, row in enumerate(found):
        row["kl"] = None if index % 2 else row["kl"]
        row["entropy"] = None
        row["reward/std"] = None if index < 5 else row["reward/std"]
        row["new/thing"] = -float(index)
    jsonl.write(copied / "metrics.jsonl", found)
    words = report(copied).words()
    assert "new/thing" in words
    assert "Entropy" not in words


def test_a_run_still_being_written_is_read_up_to_its_last_whole_line(copied):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "reward/mean": 9')
    assert "24 steps" in report(copied).words()


def test_a_long_run_stays_small(tmp_path):
    write_fake_run(tmp_path / "run", steps=1, evaluated=(0,), questions=1)
    (row,) = rows(tmp_path / "run", "metrics.jsonl")
    (tmp_path / "run/metrics.jsonl").write_text(
        "".join(json.dumps(row | {"step": step, "reward/mean": step / 1000}) + "\n" for step in range(1, 5001))
    )
    (evaluation, *_) = rows(tmp_path / "run", "evaluations.jsonl")
    jsonl.write(tmp_path / "run/evaluations.jsonl", [evaluation | {"step": step} for step in range(0, 5000, 10)])
    page = report(tmp_path / "run")
    assert (tmp_path / "run/report.html").stat().st_size < 2_000_000
    assert "5000 steps" in page.words()
    assert "40 of 500 evaluations" in page.words()
    assert "Thin: means of 21 steps" in page.words()


def test_a_long_run_with_trouble_stays_small_and_is_no_more_red_than_it_was(tmp_path):
    write_fake_run(tmp_path / "run", steps=1, evaluated=(), questions=1)
    (row,) = rows(tmp_path / "run", "metrics.jsonl")
    bad = {0: {"update/skipped": 1.0}, 1: {"missing_scores": 3}}  # Of ten steps one each, never two in a row.
    found = [row | {"step": step} | bad.get(step * 7 % 10, {}) for step in range(1, 5001)]
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    report(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    (events,) = re.findall(r'<section id="events">.*?</section>', page)
    assert len(events) < 250_000
    wide = events.partition('class="narrow"')[0]
    bars = re.findall(r'<rect class="span" [^>]*width="([\d.]+)" height="14"(?: fill-opacity="([\d.]+)")?>', wide)
    (left, right), *_ = re.findall(r'<line class="grid" x1="([\d.]+)" x2="([\d.]+)"', wide)
    painted = sum(float(width) * float(pale or 1) for width, pale in bars)
    assert painted < 0.3 * 2 * (float(right) - float(left))
    assert re.search(r"<title>no score: \d+ to \d+, 2 times</title>", wide)


def test_while_an_evaluation_goes_on_each_number_is_of_its_own_step(tmp_path):
    write_fake_run(tmp_path / "run", evaluated=(0, 6, 12))
    found = rows(tmp_path / "run", "evaluations.jsonl")
    late, kept = SPLITS[1], [row for row in found if (row["step"], row["split"]) != (12, SPLITS[1])]
    jsonl.write(tmp_path / "run/evaluations.jsonl", kept)
    report(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert "before (ring, step 0) and after (dot, step 12)" in page
    lines = {line for line in re.findall(r'<div class="gain"><span class="of">.*?</div>', page) if late in line}
    assert len(lines) == 2
    assert all('<span class="mode">(step 6)</span>' in line for line in lines)
    assert page.count("(step 6)") == 2
    jsonl.write(tmp_path / "run/evaluations.jsonl", [row for row in kept if row["split"] != late or not row["step"]])
    report(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    lines = [line for line in re.findall(r'<div class="gain"><span class="of">.*?</div>', page) if late in line]
    assert all("(step 0)" in line and 'class="dot new"' not in line for line in lines)


def test_the_command_says_what_it_wrote(copied, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    for run in (str(copied), f"~/{copied.name}"):
        assert main([run]) == 0
        assert capsys.readouterr().out == f"wrote {copied / 'report.html'}\n"


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/config.yaml").write_text("a: [")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.yaml").write_text("- a")
    for folder, reason in (
        ("none", "no such folder; expected a run directory"),
        (".", "no config.yaml in it; expected a run directory"),
        ("yaml", "not YAML"),
        ("list", "expected sections with keys, got list"),
    ):
        assert main([str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
        assert not (tmp_path / folder / "report.html").exists()


def test_a_damaged_file_is_named_and_the_old_page_stays(copied, capsys):
    write_report(copied)
    old = (copied / "report.html").read_bytes()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    assert main([str(copied)]) == 2
    assert re.fullmatch(r".*metrics\.jsonl:25: expected a JSON object on each line.*\n", capsys.readouterr().err)
    jsonl.write(copied / "metrics.jsonl", [{"kl": 1.0}])
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: expected a whole number under 'step', got None"):
        write_report(copied)
    assert (copied / "report.html").read_bytes() == old


def test_evaluations_of_other_questions_are_no_before(copied):
    rows = jsonl.read(copied / "evaluations.jsonl")
    last = max(row["step"] for row in rows)
    for counts in ({}, {last: 99}):
        jsonl.write(copied / "evaluations.jsonl", [row | {"count": counts.get(row["step"], 8)} for row in rows])
        pairs = evaluations.pairs(read_run(copied))
        assert pairs
        for before, after in pairs:
            assert after["step"] == last
            assert (before is after) == bool(counts)


def test_two_may_write_the_page_at_once(copied, monkeypatch):
    replace = os.replace

    def meanwhile(*paths):
        monkeypatch.setattr(os, "replace", replace)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            write_report(copied)
        replace(*paths)

    monkeypatch.setattr(os, "replace", meanwhile)
    assert "</html>" in write_report(copied).read_text()
    assert not list(copied.glob("*.tmp"))


def test_the_page_needs_no_jax():
    unneeded = {"jax", "torch", "flax", "scipy.optimize"}
    code = f"import sys, segzero_jax.report.__main__; print(sorted({unneeded} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("count", [10, 240, 1000, 5003])
def test_the_axis_of_a_chart_begins_and_ends_with_the_first_and_the_last_step(count):
    """Also where each point is the mean of several; the points lie within."""
    steps = range(7, 7 + count)
    drawn = [
        charts.line_chart(steps, [Series("it", [float(step) for step in steps])], "it"),
        charts.stacked_chart(steps, [Series("it", [1.0] * count)], "it"),
    ]
    for drawing in drawn:
        marks = re.findall(r'<text class="tick" x="([\d.]+)" y="184"[^>]*>(?:step )?(\d+)</text>', drawing)
        along = [(float(x), int(step)) for x, step in marks]
        assert "step 7</text>" in drawing
        assert (min(along)[1], max(along)[1]) == (7, 6 + count)
        (path,) = re.findall(r'<path class="(?:line s0|layer l0)" d="([^"]*)"', drawing)
        places = [float(x) for x, _ in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
        assert min(along)[0] <= min(places)
        assert max(places) <= max(along)[0]
        assert max(places) - min(places) > 0.98 * (max(along)[0] - min(along)[0])


def test_the_names_of_numbers_are_spelt_as_in_the_text():
    assert [label(name) for name in ("giou", "mask_iou", "box_l1", "box_accuracy")] == [
        *("gIoU", "mask IoU", "box L1", "box accuracy")
    ]


def test_a_response_leans_to_the_side_of_its_advantage(copied):
    found = rows(copied, "rollouts/24.jsonl")
    for row in found:
        row.update(advantage=(1.5, 0.75, -0.75, -1.5)[row["sample"]], finished=row["sample"] != 2)
    jsonl.write(copied / "rollouts/24.jsonl", found)
    page = Page(rollouts_section(read_run(copied)))
    assert [(attrs["class"], attrs["style"]) for attrs in page.all("i")] == [
        *(("plus", f"left:50%;width:{width}%") for width in (50.0, 25.0)),
        *(("minus", f"right:50%;width:{width}%") for width in (25.0, 50.0)),
    ]
    notes = [data for at, data in page.text if at == ("p", "note")]
    assert ["cut off at the limit" in note for note in notes] == [False, False, True, False]


def test_two_groups_about_one_question_are_two(copied):
    """A step with more questions than the set has asks one of them again; only one group is shown."""
    file = copied / "rollouts" / "24.jsonl"
    found = rows(copied, "rollouts/24.jsonl")
    assert [row["sample"] for row in found] == [0, 1, 2, 3] * 2
    for row in found:
        row.update(id=found[0]["id"], question=found[0]["question"], reward=float(row["sample"]))
    jsonl.write(file, found)
    page = report(copied)
    assert "4 responses to one training question" in page.words()
    assert sum(attrs.get("class") == "response" for attrs in page.all("div") + page.all("article")) == 4


@given(qualities=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30), paired=st.booleans())
def test_cases_are_chosen_by_what_their_names_say(qualities, paired):
    found = [
        Case("", "val", {"id": i, "iou": before} if paired else None, {"id": i, "iou": after})
        for i, (before, after) in enumerate(qualities)
    ]
    chosen = choose(found)
    ids = [case.after["id"] for case in chosen]
    assert len(ids) == len(set(ids))
    kinds = {
        kind: [case for case in chosen if case.kind == kind] for kind in ("Most improved", "Best", "Typical", "Worst")
    }
    each = max(1, min(3, len(found) // 3))

    def gain(case):
        return case.after["iou"] - (case.before["iou"] if paired else 0.0)

    top = kinds["Most improved" if paired else "Best"]
    assert len(top) == min(each, sum(gain(case) > 0.02 for case in found) if paired else each)
    rest = [case for case in found if case.after["id"] not in {c.after["id"] for c in top}]
    if rest and top:
        assert min(map(gain, top)) >= max(map(gain, rest))
    least = min((case.after["iou"] for case in top), default=1.0)
    lowest = sorted(case.after["iou"] for case in rest if case.after["iou"] <= least)[:each]
    assert sorted(case.after["iou"] for case in kinds["Worst"]) == lowest
    assert chosen, "something is shown of any run"


@pytest.mark.parametrize(
    ("before", "after", "counts", "listed"),
    [
        ([0.0], [0.5], (1, 0, 0), "the most improved."),
        (
            [0.0, 0.0],
            [0.0, 0.0],
            (0, 0, 2),
            "the typical (nearest to the median IoU) and the worst (lowest IoU) afterwards.",
        ),
        (
            [0.0, 0.5],
            [0.8, 0.9],
            (2, 0, 0),
            "the most improved and the typical (nearest to the median IoU) afterwards.",
        ),
        (
            [0.0, 0.5, 0.11, 0.3, 0.1],
            [0.8, 0.1, 0.1, 0.0, 0.11],
            (1, 2, 2),
            "the most improved, the typical (nearest to the median IoU) and the worst (lowest IoU) afterwards.",
        ),
    ],
)
def test_the_page_says_what_kinds_of_cases_it_shows(tmp_path, before, after, counts, listed):
    write_fake_run(tmp_path / "run", steps=2, evaluated=(0, 2), questions=len(before))
    for step, ious in ((0, before), (2, after)):
        (tmp_path / f"run/evaluations/{step}_{SPLITS[1]}.jsonl").unlink()
        file = tmp_path / f"run/evaluations/{step}_{SPLITS[0]}.jsonl"
        jsonl.write(file, [row | {"iou": iou} for row, iou in zip(jsonl.read(file), ious, strict=True)])
    page = report(tmp_path / "run")
    improved, worse, stayed = counts
    said = f"{improved} improved in IoU by more than 0.02, {worse} got worse, {stayed} stayed. Shown are {listed}"
    assert said in page.words()
    kinds = [data for at, data in page.text if at and at[0] == "b" and data in ("Most improved", "Typical", "Worst")]
    assert [f"the {kind.lower()}" for kind in kinds] == re.findall(r"the (?:most improved|typical|worst)", listed)


def test_without_a_reward_server_the_page_tells_of_no_masks(tmp_path):
    for name, masks in (("none", False), ("sam", True), ("untold", True)):
        run = tmp_path / name
        write_fake_run(run, steps=1, evaluated=(0,), questions=1, masks=masks)
        if name == "untold":
            config = yaml.safe_load((run / "config.yaml").read_text())
            del config["reward"]["server"]
            (run / "config.yaml").write_text(yaml.safe_dump(config))
        words = report(run).words()
        assert ("scored by SAM 2's masks" in words) == masks, name
        assert ("scored by what it writes" in words) != masks, name
        assert words.count("mask IoU weight") == masks, name
        assert words.count("predicted mask and box") == 2 * masks, name
        assert words.count("predicted box") == 2 * (not masks), name


@pytest.mark.parametrize(("giou", "said"), [(0.5, "predicted mask and box"), (None, "predicted box")])
def test_the_page_of_an_evaluation_tells_of_masks_where_they_were_made(giou, said):
    result = {"dataset": "toy", "split": "val", "checkpoint": "c", "failed": [], "failures": {}}
    shown = Shown(result | {"expression": {"giou": giou}}, [], [], lambda _: None, "vision_reasoner")
    (legend,) = re.findall(r"predicted (?:mask and )?box", build_gallery("it", [shown], {"evaluations": []}))
    assert legend == said


@pytest.mark.parametrize(("count", "said"), [(1, "1 answer failed and counts as 0"), (2, "2 answers failed and count")])
def test_the_page_of_an_evaluation_counts_failures(count, said):
    failed = [{"id": f"q{i}", "cause": "not_json", "error": "no JSON"} for i in range(count)]
    result = {"dataset": "toy", "split": "val", "checkpoint": "c", "failed": failed, "failures": {"not_json": count}}
    shown = Shown(result | {"expression": {"giou": 0.5}}, [], [], lambda _: None, "vision_reasoner")
    assert said in build_gallery("it", [shown], {"evaluations": []})


def test_the_answers_of_a_column_lie_within_its_bounds():
    result = {"dataset": "toy", "split": "val", "checkpoint": "c", "failed": [], "failures": {}}
    found = [{"sample": 1, "iou": iou} for iou in (0.0, 0.04, 0.05, 0.99, 1.0)]
    shown = Shown(result | {"expression": {"giou": 0.5}}, found, [], lambda _: None, "vision_reasoner")
    columns = re.findall(r'title="([1-9][^"]*)"', build_gallery("it", [shown], {"evaluations": []}))
    assert columns == [
        f"{n} answers of {low} to {high}"
        for n, low, high in ((2, "0.00", "0.05"), (1, "0.05", "0.10"), (2, "0.95", "1.00"))
    ]


def test_the_rank_of_adapters_is_among_the_settings(copied):
    assert "LoRA rank" not in report(copied).words()
    set_key(copied, "model", "lora_rank", 4)
    assert "<dt>LoRA rank</dt><dd>4</dd>" in write_report(copied).read_text()


def test_the_mask_iou_of_answers_is_drawn_where_the_reward_does_not_show_it(copied):
    drawn = lambda: "Mask IoU of answers" in report(copied).words()  # noqa: E731
    found = rows(copied, "metrics.jsonl")
    assert all(row["mask_iou/mean"] == row["reward/mask_iou"] for row in found)
    assert not drawn()
    jsonl.write(copied / "metrics.jsonl", [{k: v for k, v in row.items() if k != "reward/mask_iou"} for row in found])
    assert drawn()
    jsonl.write(copied / "metrics.jsonl", [row | {"reward/mask_iou": 0.0} for row in found])
    assert drawn()
    assert "mask_iou/mean" not in report(copied).words()


def test_no_axis_has_negative_numbers_where_nothing_is_negative(copied):
    """A run that scores 0 throughout."""
    for name in ("metrics", "evaluations"):
        found = rows(copied, f"{name}.jsonl")
        jsonl.write(copied / f"{name}.jsonl", [{key: nought(key, value) for key, value in r.items()} for r in found])
    page = report(copied)
    (scale,) = re.findall(r'<div class="gain scale">.*?</div>', (copied / "report.html").read_text())
    marks = re.findall(r">(-?[\d.]+)</b>", scale)
    assert min(map(float, marks)) == 0.0
    assert "0" in page.words("tick").split()
    assert MINUS not in page.words("tick")


def nought(key, value):
    return 0.0 if isinstance(value, float) and not key.startswith("time/") else value


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ((4000, 30), "Drawn 23 times as high."),
        ((30, 2000), "Drawn 12 times as wide."),
        ((600, 100), ""),
        ((100, 600), ""),
    ],
)
def test_a_strip_of_a_picture_can_be_seen_with_its_marks_in_place(size, note):
    width, height = size
    mask = np.zeros((height, width), bool)
    mask[height // 2 :, width // 2 :] = True
    row = {
        "objects": [{"box": [0, height / 8, width / 4, height / 4], "points": []}],
        "mask": {"height": height, "width": width, "counts": coco.encode(np.asfortranarray(mask))["counts"].decode()},
    }
    page = Page(cards.picture(Image.new("RGB", size, "white"), row, {}, "it"))
    assert page.words("note").strip() == note
    (shown,) = page.all("img")
    with Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2]))) as picture:
        blue = 255 - np.asarray(picture, float)[..., 0]
    assert 440 / 6 - 1 <= blue.shape[0] <= 440 * 6
    middle, centre = (side // 2 for side in blue.shape)
    assert blue[middle + 5 :, centre + 5 :].mean() > 60
    assert blue[: middle - 5, centre + 5 :].mean() < 5
    assert blue[middle + 5 :, : centre - 5].mean() < 5
    assert 5 < blue[: middle - 5, : centre - 5].mean() < 60  # the box
    assert blue[5 + middle // 2 : middle - 5, : centre - 5].mean() < 5
    assert blue[: middle // 4 - 5, : centre - 5].mean() < 5


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9), count=st.integers(2, 12))
def test_ticks_are_few_and_inside(low, span, count):
    found = charts.ticks(low, low + span, count)
    assert len(found) <= count + 2
    assert all(low - 1e-6 * (span + abs(low)) <= tick <= low + span + 1e-6 * (span + abs(low)) for tick in found)


@given(values=st.lists(st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=60), window=st.sampled_from((1, 3, 9)))
def test_smoothing_is_a_mean_of_what_is_there(values, window):
    half = window // 2
    for index, smoothed in enumerate(charts.smooth(values, window)):
        near = [value for value in values[max(0, index - half) : index + half + 1] if value is not None]
        if values[index] is None:
            assert smoothed is None
        else:
            assert smoothed == pytest.approx(np.mean(near), rel=1e-6, abs=1e-6)


@given(
    values=st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=500),
    floor=st.sampled_from((None, 0.0)),
    maximum=st.sampled_from((None, 1.0)),
)
def test_lines_stay_in_the_drawing_and_break_at_gaps(values, floor, maximum):
    steps = list(range(1, len(values) + 1))
    drawing = charts.line_chart(steps, [Series("a", values)], "x", floor=floor, maximum=maximum)
    Page(drawing)
    path = re.search(r'<path class="line s0" d="([^"]*)"', drawing).group(1)
    if len(values) <= 240:
        runs = "".join(" " if value is None else "x" for value in values).split()
        assert path.count("M") == len(runs)
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path):
        assert 0 <= float(x) <= 350
        assert 0 <= float(y) <= 190


@given(
    values=st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    floor=st.sampled_from((None, 0.0)),
    maximum=st.sampled_from((None, 1.0)),
)
@example([1e308] * 241, None, None)
@example([1e300, -1e300], None, None)
@example([-1.7e308, 1.7e308, 1.0], None, 1.0)
@example([5e-324], 0.0, None)
@example([0.0, 5e-324], None, None)
@example([1e-310, 3e-310], 0.0, None)
def test_any_number_has_its_place_in_the_drawing(values, floor, maximum):
    """A gradient that explodes, a probability that vanishes."""
    steps = list(range(1, len(values) + 1))
    smoothed = charts.smooth(values, charts.smoothing_window(len(values)) + 2)
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    assert all(abs(value) <= largest for value in smoothed if value is not None)
    line = Series("a", smoothed, faint=values)
    for drawing in (
        charts.line_chart(steps, [line], "x", floor=floor, maximum=maximum),
        charts.stacked_chart(steps, [Series("a", [value and abs(value) for value in values]), line], "x"),
    ):
        Page(drawing)
        for path in re.findall(r'<path class="[^"]*" d="([^"]*)"', drawing):
            for x, y in re.findall(r"[ML]([^ ]+) ([^MLZ]+)", path):
                assert 0 <= float(x) <= 350
                assert math.isfinite(float(y))


@pytest.mark.parametrize("numbers", [(5e-324,), (1e300, -1e300), (-1e308, 1e308), (1.7e308, 0.5)])
def test_a_page_is_made_of_any_numbers(copied, numbers):
    found = rows(copied, "metrics.jsonl")
    kept = ("step", "tokens_per_second")
    change = lambda row, number: {key: number for key in row if key not in kept and not key.startswith("time/")}  # noqa: E731
    extreme = [row | change(row, numbers[index % len(numbers)]) for index, row in enumerate(found)]
    jsonl.write(copied / "metrics.jsonl", extreme)
    report(copied)


@pytest.mark.parametrize(
    "values", [[None, 2.0, None], [1.0, None, 2.0, 3.0, None, 4.0], [1.0], [None, None], [1.0, 2.0]]
)
def test_what_stands_alone_is_a_dot(values):
    drawing = charts.line_chart(list(range(1, len(values) + 1)), [Series("a", values)], "x")
    seen = re.sub(r'<g class="at">.*?</g>', "", drawing)
    line = re.search(r'<path class="line s0" d="([^"]*)"', seen).group(1)
    dots = re.findall(r'<circle class="point s0" cx="([^"]*)" cy="([^"]*)"', seen)
    assert dots == re.findall(r"M([\d.]+) ([\d.]+)(?!L)(?=M|$)", line)


def test_higher_values_are_drawn_higher_and_later_steps_further_right():
    drawing = charts.line_chart([1, 2, 3], [Series("a", [0.0, 1.0, 0.5])], "x", maximum=2.0, floor=0.0)
    points = re.findall(r"[ML]([\d.]+) ([\d.]+)", re.search(r'class="line s0" d="([^"]*)"', drawing).group(1))
    (x1, y1), (x2, y2), (x3, y3) = ((float(x), float(y)) for x, y in points)
    assert x1 < x2 < x3
    assert y2 < y3 < y1
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.2)
    assert "step 2" in drawing
    assert '<line class="max"' in drawing


def test_the_band_around_the_reward_is_as_wide_above_as_below(copied):
    found = rows(copied, "metrics.jsonl")
    jsonl.write(copied / "metrics.jsonl", [row | {"reward/mean": 3.0, "reward/std": 0.5} for row in found])
    drawing = reward_section(read_run(copied))
    band, line = (re.search(rf'<path class="{kind} s0" d="([^"]*)"', drawing).group(1) for kind in ("band", "line"))
    (top, bottom), (middle,) = (sorted({float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", d)}) for d in (band, line))
    assert middle - top == pytest.approx(bottom - middle, abs=0.2)
    assert middle - top > 10


def test_a_peak_leaves_the_rest_its_height():
    drawing = charts.stacked_chart(range(1, 11), [Series("it", [1.0] * 9 + [100.0])], "it")
    (path,) = re.findall(r'<path class="layer l0" d="([^"]*)"', drawing)
    top, usual, bottom = sorted({float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)})
    assert bottom - usual == pytest.approx((bottom - top) / 3, abs=0.2)
    assert "step 10  in all 100" in drawing


def test_names_at_the_ends_of_lines_do_not_overlap():
    drawing = charts.line_chart([1, 2], [Series(name, [float(i), 2.0]) for i, name in enumerate("abc")], "it")
    places = sorted(float(y) for y in re.findall(r'<text class="name s\d" x="[\d.]+" y="([\d.]+)"', drawing))
    assert len(places) == 3
    assert min(np.diff(places)) >= 12


def test_the_read_out_gives_the_step_itself_beside_the_smoothed_line(run_dir, page):
    value = rows(run_dir, "metrics.jsonl")[11]["reward/mean"]
    assert f"step 12  {show(value)}, smoothed " in page.words()


def test_series_are_told_apart_without_colour(page, run_dir):
    style = re.search(r"<style>(.*?)</style>", (run_dir / "report.html").read_text(), re.DOTALL).group(1)
    assert "svg .line.s1 { stroke-dasharray" in style
    assert set(page.words("name s0").split()) == {"greedy", "mean"}
    assert set(page.words("name s1").split()) == {"sampled", "max"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.5, "0.500"),
        (-1234.5, f"{MINUS}1,234"),
        (1e-5, "1.0\N{MULTIPLICATION SIGN}10⁻⁵"),
        (2.34567, "2.35"),
        (None, NOTHING),
        ("x", NOTHING),
    ],
)
def test_numbers_read_well(value, shown):
    assert show(value) == shown


def test_ends_compare_halves_of_a_short_run():
    assert ends([]) is None
    assert ends([None, 2.0]).window == 1
    short = ends([1.0, 3.0, 5.0, 7.0, None])
    assert (short.window, short.first, short.last, short.first_error, short.last_error) == (2, 2.0, 6.0, 1.0, 1.0)
    assert ends(list(range(40))).last == 34.5


@pytest.mark.parametrize("recipe", sorted(rewards.RECIPES))
def test_maxima_are_those_of_the_rewards(tmp_path, recipe):
    write_fake_run(tmp_path / "run", steps=1, evaluated=())
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["reward"].update(recipe=recipe, mask_iou_weight=2.0, mask_iou_mode="tiered")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    maxima = reward_maxima(read_run(tmp_path / "run"))
    assert maxima.total == rewards.maximum(recipe, 2.0, "tiered")
    assert maxima.components["mask_iou"] == rewards.mask_component(1.0, "tiered")
    for name in rewards.component_names(recipe):
        assert maxima.components[name] == (4.0 if name == "mask_iou" else rewards.RECIPES[recipe].maxima[name])
