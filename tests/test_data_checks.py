"""Before the first step: the count of every prompt is the encoder's, and what does not fit or is held out is named."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import question_sources as sources
from PIL import Image
from thread_pod import on_hosts

from segzero_jax import config as configs
from segzero_jax.config import Config
from segzero_jax.data import build, checks
from segzero_jax.data.checks import check_held_out, check_prompts, check_same, counted_once
from segzero_jax.data.pipeline import DataError, Source, Splits, open_split
from segzero_jax.processor import Processor, PromptTooLong, settings_directory
from segzero_jax.prompt import WORDINGS
from segzero_jax.recipe_check import check_splits
from segzero_jax.train import open_questions

TEXTS = ["mug", "the <|image_pad|> that looks most like a café", "A Thing. " * 20, "…", "<|im_end|> 漢字", "left" * 50]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    source = sources.solution_parquet(folder / "s", problem=TEXTS)
    assert build.main(["r", f"--source={source}", f"--data-dir={folder}", "--workers=1"]) == 0
    return folder


def processor(wording: str = "toy", size: int = 84, limit: int = 10_000) -> Processor:
    return Processor.load("toy", size, wording, limit)


@pytest.mark.parametrize("wording", ["toy", "seg_zero", "vision_reasoner"])
@pytest.mark.parametrize("size", [56, 84])
def test_the_count_is_the_length_of_the_encoded_prompt(built: Path, wording: str, size: int) -> None:
    source = open_split("r", "train", built)
    used = processor(wording, size)
    lengths = [len(used.encode(example).tokens_p) for example in source]
    assert used.count_tokens(TEXTS).tolist() == lengths
    assert check_prompts(source, used, built) == max(lengths)


def test_what_does_not_fit_is_named_with_what_to_do(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more questions than are counted at once."""
    monkeypatch.setattr(checks, "_BLOCK", 4)
    source = open_split("r", "train", built)
    counts = processor().count_tokens(TEXTS).tolist()
    (second, longest), limit = sorted(counts)[-2:], sorted(counts)[-3]
    assert check_prompts(source, processor(limit=longest), tmp_path) == longest
    with pytest.raises(PromptTooLong) as caught:
        check_prompts(source, processor(limit=limit), tmp_path)
    first, then = (f"refcocog_{16000 + counts.index(n)} with {n}" for n in (longest, second))
    assert str(caught.value) == (
        f"r/train: 2 of 6 prompts do not fit, expected at most max_prompt_tokens={limit}: {first}, {then}; "
        f"rollout.max_prompt_tokens={longest} takes all of them"
    )


def test_a_count_is_remembered_by_what_it_depends_on(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_split("r", "train", built)
    most = check_prompts(source, processor(), tmp_path)
    counted: list[str] = []
    real = Processor.count_tokens
    monkeypatch.setattr(
        Processor, "count_tokens", lambda self, texts: counted.append(self._wording) or real(self, texts)
    )
    assert check_prompts(source, processor(), tmp_path) == most
    assert counted == []
    check_prompts(source, processor("seg_zero"), tmp_path)
    check_prompts(source, processor(size=56), tmp_path)
    check_prompts(
        Source(source.name, "built anew", source._rows, source._decode, source._places), processor(), tmp_path
    )
    assert counted == ["seg_zero", "toy", "toy"]
    # A wording is known by its text, not by its name.
    monkeypatch.setitem(WORDINGS, "seg_zero", WORDINGS["seg_zero"] + " Be brief.")
    check_prompts(source, processor("seg_zero"), tmp_path)
    assert counted == ["seg_zero", "toy", "toy", "seg_zero"]
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (model / name).write_bytes((settings_directory("toy") / name).read_bytes())
    tokenizer = json.loads((settings_directory("toy") / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert check_prompts(source, Processor.load(model, 84, "toy", 10_000), tmp_path) > most, "a token for each byte"


def test_a_count_survives_what_happens_to_its_file(tmp_path: Path) -> None:
    """Damage, and others who count the same at the same time."""
    path = tmp_path / "counts/name.npy"
    numbers = np.arange(1000)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(40):
            found = pool.map(lambda _: counted_once(path, lambda: numbers), range(8))
            assert all(np.array_equal(one, numbers) for one in found)
            path.unlink()
    for damage in (b"", b"\x93NUMPY"):
        path.write_bytes(damage)
        assert np.array_equal(counted_once(path, lambda: numbers), numbers)
        assert np.array_equal(np.load(path), numbers)
    assert [one.name for one in path.parent.iterdir()] == ["name.npy"]


def test_data_where_nobody_may_write_is_counted_each_time(built: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file stands where the folder would be")
    assert check_prompts(open_split("r", "train", built), processor(), tmp_path / "file") > 0


def test_prompts_of_every_split_of_a_run_have_to_fit(built: Path, tmp_path: Path) -> None:
    source = sources.solution_parquet(tmp_path / "s", problem=["mug"] * 6)
    assert build.main(["short", f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
    short, long = open_split("short", "train", tmp_path), open_split("r", "train", built)
    used = processor(limit=check_prompts(short, processor(), tmp_path))
    config = configs.replace(Config(), **{"data.dir": str(tmp_path)})
    for splits in (Splits([long], []), Splits([short, long], []), Splits([short], [long])):
        with pytest.raises(PromptTooLong, match=r"^r/train: "):
            check_splits(splits, config, used)


def test_pictures_of_one_camera_are_trained_on_and_evaluated(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Splits of one set whose pictures look the same; two sets of them are a leak."""
    view = sources.picture(1)
    for name in ("camera", "other"):
        for split, moved in (("train", 10), ("val", 60)):
            scene = view.copy()
            scene.paste((250, 250, 250), (moved, 40, moved + 6, 46))
            row = {"image": f"{split}.png", "question": "the mug", "masks": []}
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.png").write_bytes(sources.encoded(scene, "PNG"))
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(row))
        arguments = [name, f"--source={tmp_path / name}", f"--data-dir={tmp_path}", "--workers=1"]
        assert build.main(arguments) == 0
        assert build.main(arguments) == 0
    train, val = (open_split("camera", split, tmp_path) for split in ("train", "val"))
    check_held_out(train, [val])
    with pytest.raises(DataError, match="looks the same"):
        check_held_out(train, [open_split("other", "val", tmp_path)])
    config = configs.replace(Config(), **{"data.dir": str(tmp_path), "rollout.max_prompt_tokens": 999})
    check_splits(Splits([train], [val]), config, processor())
    several = Splits([train, open_split("other", "train", tmp_path)], [open_split("r", "train", built), val])
    with pytest.raises(DataError, match="1 of 1 questions of other/train are about pictures of camera/val"):
        check_splits(several, config, processor())
    assert build.main([*arguments, "--rebuild", "--against", "camera/val"]) == 2
    assert "looks the same" in capsys.readouterr().err


def test_a_held_out_picture_is_refused_before_training(built: Path, tmp_path: Path) -> None:
    """Also behind a generated split, whose pictures are not known, and one that has none of them."""
    image = [
        {"bytes": sources.encoded(sources.picture(seed).resize((200, 300), Image.Resampling.BICUBIC)), "path": None}
        for seed in (1, 1004, 2, 3)
    ]
    mask = [sources.rectangle(1, 1, 50, 50, 200, 300).tolist()] * 4
    source = sources.mask_parquet(tmp_path / "s", image=image, mask=mask)
    sources.mask_parquet(source, split="val", first=2100)
    assert build.main(["held", f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
    train = open_split("r", "train", built)
    check_held_out(train, [])
    generated = Source("toy/val", "made up", train._rows, train._decode)
    with pytest.raises(
        DataError, match=r"1 of 6 questions of r/train are about pictures of held/test, the first is ref"
    ) as e:
        check_held_out(train, [generated, *(open_split("held", split, tmp_path) for split in ("val", "test"))])
    assert "refcocog_16004: test-picture_1-1 (looks the same" in str(e.value)
    assert "--against held/test --drop-leaks" in str(e.value)


def test_hosts_that_have_built_another_set_are_found_out_on_all() -> None:
    """A host that has none says so itself; the others say nothing of it."""
    for other in ({"r/train": "b" * 64, "r/val": "c" * 64}, {"r/train": "a" * 64, "r/val": "b" * 64}):
        found = [{"r/train": "a" * 64, "r/val": "c" * 64}, {}, other]
        (name,) = (name for name in other if other[name] != found[0][name])
        for end in on_hosts(3, lambda pod, found=found: check_same(found[pod.index], pod)):
            with pytest.raises(DataError) as caught:
                end.result()
            assert str(caught.value) == (
                f"{name}: checksum {found[0][name][:12]} on host 0 (w-0), {other[name][:12]} on host 2 (w-2); "
                "build it on all hosts from the same source, in the same way"
            )
    for end in on_hosts(3, lambda pod: check_same(found[0] if pod.index else {}, pod)):
        end.result()


def test_a_pod_whose_hosts_have_built_different_sets_does_not_train(built: Path, tmp_path: Path) -> None:
    source = sources.solution_parquet(tmp_path / "s", problem=[*TEXTS[1:], TEXTS[0]])
    assert build.main(["r", f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
    given = [
        configs.replace(Config(), **{"data.name": "r", "data.dir": str(place), "data.eval_splits": []})
        for place in (built, tmp_path)
    ]
    for end in on_hosts(2, lambda pod: open_questions(given[pod.index], pod)):
        with pytest.raises(DataError, match=r"^r/train: checksum \w{12} on host 0 \(w-0\), \w{12} on host 1 \(w-1\); "):
            end.result()
    for end in on_hosts(2, lambda pod: open_questions(given[0], pod)):
        assert [split.name for split in end.result().train] == ["r/train"]
