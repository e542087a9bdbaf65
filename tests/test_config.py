"""The configuration: what is accepted, and the one line that says why something is not."""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax import config, rewards
from segzero_jax.config import Config, ConfigError


def message_of(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(folder: Path, text: str) -> Path:
    path = folder / "preset.yaml"
    path.write_text(text)
    return path


def test_yaml_file_and_overrides_reach_their_fields(tmp_path):
    path = write(tmp_path, "seed: 7\ntrain:\n  lr: 1e-6\n  steps: 3\ndata:\n  eval_splits: [val]\n")
    loaded = config.load(path, ["train.steps=9", "model.remat=true", "mesh=4x4", "data.eval_splits=[a, b]"])
    expected = config.replace(
        Config(),
        **{
            "seed": 7,
            "train.lr": 1e-6,
            "train.steps": 9,
            "model.remat": True,
            "mesh": "4x4",
            "data.eval_splits": ("a", "b"),
        },
    )
    assert loaded == expected
    assert loaded.data.eval_splits == ("a", "b")
    assert isinstance(loaded.train.lr, float)


def test_a_preset_leaves_other_sections_at_their_defaults(tmp_path):
    loaded = config.load(write(tmp_path, "rollout: {group_size: 4}\n"))
    assert config.differing_keys(loaded, Config()) == ["rollout.group_size"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}"])
def test_an_empty_file_is_the_default(tmp_path, text):
    assert config.load(write(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("run.dir=2026", "run", "2026"),
        ("run.dir=2026-01-02", "run", "2026-01-02"),
        ("run.dir=on", "run", "on"),
        ("run.dir=a: b", "run", "a: b"),
    ],
)
def test_text_stays_text_whatever_yaml_would_make_of_it(override, field, value):
    assert getattr(config.load(None, [override]), field).dir == value


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**31),
            "train.lr": st.floats(0, 1),
            "train.steps": st.integers(1, 10**6),
            "reward.recipe": st.sampled_from(sorted(set(rewards.RECIPES) - {"sam_r1"})),
            "model.freeze_vision": st.booleans(),
            "data.eval_splits": st.lists(st.sampled_from(["val", "test"])),
            "run.dir": st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        },
    )
)
def test_what_is_written_to_a_run_is_read_back_equal(changes):
    changed = config.replace(Config(), **changes)
    again = config.build(yaml.safe_load(config.to_yaml(changed)))
    assert again == changed
    assert set(config.differing_keys(changed, Config())) <= changes.keys()


def test_values_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {step: 5}", ["unknown key 'train.step'", "did you mean 'train.steps'"]),
        ("learning: {rate: 5}", ["unknown key 'learning.rate'", "--help lists the keys"]),
        ("rollout: {lr: 1.0e-6}", ["unknown key 'rollout.lr'", "did you mean 'train.lr'"]),
        ("model: toy", ["model: is a section", "model.path"]),
        ("train:", ["train: is a section", "train.steps"]),
        ('"": 5', ["unknown key ''"]),
        ("train: {lr: {value: 1}}", ["unknown key 'train.lr.value'"]),
        ("train: {steps: 0}", ["train.steps=0", "greater than 0"]),
        ("train: {steps: yes}", ["train.steps=True", "expected int"]),
        ("model: {remat: 7}", ["model.remat=7", "boolean"]),
        ("train: {steps: many}", ["train.steps='many'", "valid integer"]),
        ("train: {lr: .nan}", ["train.lr=nan", "finite"]),
        ("train: {lr: -1}", ["train.lr=-1", "greater than or equal to 0"]),
        ("rollout: {group_size: 1}", ["rollout.group_size=1", "greater than or equal to 2"]),
        ("rollout: {temperature: 0}", ["rollout.temperature=0", "greater than 0"]),
        ("rollout: {temperature: .inf}", ["rollout.temperature=inf", "finite"]),
        ("rollout: {top_p: 1.5}", ["rollout.top_p=1.5", "less than or equal to 1"]),
        ("data: {image_size: 100}", ["data.image_size=100", "multiple of 28"]),
        ("data: {eval_splits: val}", ["data.eval_splits='val'", "expected a list, [val]"]),
        ("data: {eval_splits: }", ["data.eval_splits=None", "expected a list, []"]),
        ("data: {eval_splits: [val, 3]}", ["data.eval_splits.1=3", "valid string"]),
        ("run: {dir: ''}", ["run.dir=''", "at least 1 character"]),
        ("run: {dir: 2026}", ["run.dir=2026", "valid string"]),
        ("reward: {recipe: best}", ["reward.recipe='best'", "'vision_reasoner'"]),
        ("reward: {server: somewhere}", ["reward.server=somewhere", "host:port"]),
        ("reward: {server: 'a:1,b'}", ["reward.server=a:1,b", "host:port"]),
        ("reward: {server: 'a:99999'}", ["reward.server=a:99999", "host:port"]),
        ("train: {batch_size: 10, micro_batch_size: 4}", ["train.batch_size=10", "train.micro_batch_size=4"]),
        ("reward: {recipe: sam_r1, server: none}", ["reward.recipe=sam_r1", "got none"]),
        ("train.steps: 5", ["train.steps: expected the key steps in the section train"]),
    ],
)
def test_a_bad_file_names_itself_the_key_the_value_and_what_was_expected(tmp_path, text, parts):
    path = write(tmp_path, text)
    message = message_of(config.load, path)
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message


def test_merged_sections_are_read_as_yaml_means_them(tmp_path):
    """What "<<" brings is a default: a key beside it is no second one."""
    path = write(tmp_path, "train: {<<: {steps: 3, lr: 2.0}, lr: 1.0e-3}\n")
    loaded = config.load(path)
    assert (loaded.train.steps, loaded.train.lr) == (3, 1e-3)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"train: &again {steps: *again}\n", "refers to itself"),
        (b"train: [1", "not YAML"),
        (b"train: {lr: 1}\ntrain: {steps: 2}\n", "'train' is given twice"),
        (b"train:\n  lr: 1\n  lr: 2\n", "'lr' is given twice"),
        (b"[a, b]: 1\n", "expected a name as key"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not YAML"),
        (b"- a\n- b\n", "expected sections with keys, got list"),
        (b"42\n", "expected sections with keys, got int"),
        (b"!!python/object/apply:os.getcwd []\n", "not YAML"),
        (b"seed: 1\nrun: {dir: 2026-02-31}\n", "line 2, column 12"),
        (b"seed: " + b"9" * 5000, "not YAML: Exceeds the limit"),
    ],
)
def test_a_file_that_is_not_a_preset_is_one_line(tmp_path, content, part):
    path = tmp_path / "preset.yaml"
    path.write_bytes(content)
    message = message_of(config.load, path)
    assert message.startswith(f"{path}: ")
    assert part in message


def test_a_missing_file_says_where_presets_are(tmp_path):
    message = message_of(config.load, tmp_path / "none.yaml")
    assert "no such file" in message
    assert "configs/" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.step=5", ["command line", "unknown key 'train.step'", "'train.steps'"]),
        ("train.steps=0", ["command line", "train.steps=0", "greater than 0"]),
        ("train.steps=[1", ["train.steps='[1'", "valid integer"]),
        ("train.lr=", ["train.lr=None", "valid number"]),
        ("seed=2026-13-01", ["seed='2026-13-01'", "valid integer"]),
        ("seed=" + "9" * 5000, ["seed='99", "exceeded maximum size"]),
        ("data.eval_splits=val,ReasonSeg/val", ["data.eval_splits='val,ReasonSeg/val'", "a list, [val,ReasonSeg/val]"]),
        ("reward.functions=my:reward", ["reward.functions='my:reward'", "expected a list, [my:reward]"]),
        ("reward.server=", ["reward.server=''", "at least 1 character"]),
        ("train=5", ["train: is a section"]),
        ("train.steps", ["--train.steps: expected --train.steps=value"]),
        ("train.beta2=1", ["train.beta2=1", "less than 1"]),
        ("seed=4294967296", ["seed=4294967296", "less than 4294967296"]),
        ("train.batch_size=24", ["train.batch_size=24", "train.micro_batch_size=16"]),
        ("train.mini_batch_size=12", ["train.batch_size=16", "train.mini_batch_size=12"]),
        ("train.mini_batch_size=8", ["train.mini_batch_size=8", "train.micro_batch_size=16"]),
        ("train.lr_decay=cosine", ["train.decay_steps=0", "train.warmup_steps=0"]),
    ],
)
def test_a_bad_override_is_one_line(override, parts):
    message = message_of(config.load, None, [override])
    for part in parts:
        assert part in message


@pytest.mark.parametrize("server", ["local", "none", "localhost:50051", "10.0.0.2:50051,10.0.0.3:50051", "[::1]:50051"])
def test_every_kind_of_reward_server_is_accepted(server):
    assert config.load(None, [f"reward.server={server}"]).reward.server == server


def test_replace_checks_as_strictly_as_a_file():
    assert "unknown key 'train.step'" in message_of(lambda: config.replace(Config(), **{"train.step": 1}))
    assert "train.steps=0" in message_of(lambda: config.replace(Config(), **{"train.steps": 0}))


def read(*argv: str) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(prog="train", description="Trains.")
    parser.add_argument("--resume", action="store_true")
    return config.parse_command_line(parser, argv)


def test_a_preset_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "train: {steps: 3}\n")
    assert read("--config=~/preset.yaml")[1].train.steps == 3


def test_command_line_gives_the_commands_own_options_and_the_configuration(tmp_path):
    path = write(tmp_path, "train: {steps: 3}\nseed: 1\n")
    args, loaded = read("--resume", "--config", str(path), "--mesh=4x4", "--train.lr", "1e-5")
    assert args.resume
    assert loaded == config.replace(Config(), **{"train.steps": 3, "seed": 1, "mesh": "4x4", "train.lr": 1e-5})


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.step=5"], ["unknown key 'train.step'", "'train.steps'"]),
        (["--train.steps=many"], ["train.steps='many'", "valid integer"]),
        (["--train.steps"], ["--train.steps", "expected one argument"]),
        (["--config=none.yaml"], ["none.yaml", "no such file"]),
        (["train.steps=5"], ["unexpected 'train.steps=5'", "--key=value"]),
        (["--res"], ["unknown key 'res'"]),
        (
            ["--data.prompt=seg_zero"],
            [
                "data.prompt=seg_zero: asks for one object",
                "reward.recipe=vision_reasoner scores a list of objects",
                "expected reward.recipe=seg_zero_soft or seg_zero_strict or seg_zero_soft_accuracy or sam_r1, or "
                "data.prompt=toy or vision",
            ],
        ),
        (
            ["--data.prompt=vision_reasoner", "--reward.recipe=seg_zero_soft"],
            [
                "data.prompt=vision_reasoner: asks for a list",
                "reward.recipe=seg_zero_soft scores one object",
                "expected reward.recipe=vision_reasoner or sam_r1, or data.prompt=seg_zero",
            ],
        ),
        (
            ["--data.prompt=seg_zero", "--reward.recipe=seg_zero_no_thinking"],
            [
                "data.prompt=seg_zero: asks for one object with two points, ",
                "reward.recipe=seg_zero_no_thinking scores one object with two points and no reasoning; ",
                "expected reward.recipe=seg_zero_soft or seg_zero_strict or seg_zero_soft_accuracy or sam_r1, or "
                "data.prompt=a text with {question}",
            ],
        ),
        (
            ["--data.prompt=Please find it.\n" + "Think. " * 20],
            ["data.prompt=Please find it. Think. ", "…: expected toy"],
        ),
        (["--data.prompt=seg_zer"], ["data.prompt=seg_zer: expected toy, seg_zero, ", "a text with {question}"]),
        (["--reward.recipe=seg_zero_strict"], ["data.prompt=toy: asks for a list", "or data.prompt=seg_zero"]),
        (
            ["--config=a.yaml", "--config=b.yaml"],
            ["--config=b.yaml: --config=a.yaml is given already", "--section.key="],
        ),
    ],
)
def test_command_line_mistakes_are_one_line_and_exit_2(argv, parts, capsys):
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("prompt", ["toy", "seg_zero", "vision_reasoner", 'Box "{question}".'])
def test_sam_r1_goes_with_every_wording(prompt):
    _, loaded = read(f"--data.prompt={prompt}", "--reward.recipe=sam_r1")
    assert loaded.data.prompt == prompt


@pytest.mark.parametrize("recipe", rewards.RECIPES)
def test_a_wording_of_ones_own_goes_with_every_recipe(recipe):
    wording = "Box {question} in JSON:\n[{'bbox_2d': …}], # 100%"
    _, loaded = read(f"--data.prompt={wording}", f"--reward.recipe={recipe}")
    assert loaded.data.prompt == wording
    assert config.build(yaml.safe_load(config.to_yaml(loaded))) == loaded


def test_a_policy_may_be_asked_in_a_wording_that_it_is_not_trained_in():
    assert config.load(None, ["data.prompt=seg_zero"]).reward.recipe == "vision_reasoner"


@pytest.mark.parametrize(
    "changes",
    [
        ["data.name=mugs", "reward.server=none"],
        ["data.name=mugs", "reward.server=gpu:50051"],
        ["data.name=mugs", "reward.local_model=facebook/sam2.1-hiera-large"],
        ["data.name=mugs,toy"],
        ["model.path=Qwen/Qwen2.5-VL-3B-Instruct"],
    ],
)
def test_a_local_server_scores_what_its_sam_2_knows(changes):
    config.check_local_model(config.load(None, changes))


def test_the_toys_sam_2_is_refused_for_other_pictures():
    with pytest.raises(config.ConfigError) as error:
        config.check_local_model(config.load(None, ["data.name=mugs"]))
    assert str(error.value) == (
        "reward.local_model=toy: knows the toy set's pictures alone, data.name=mugs has others; expected another SAM 2 "
        "for reward.server=local, such as --reward.local_model=facebook/sam2.1-hiera-large, or reward.server=none"
    )


def test_what_would_not_be_trained_can_be_read(tmp_path):
    """Runs of earlier versions are asked and exported by their config.yaml."""
    loaded = config.load(None, ["data.name=mugs", "train.decay_steps=9"])
    assert config.load(write(tmp_path, config.to_yaml(loaded))) == loaded


def test_a_key_on_the_command_line_counts_where_it_is_given_last():
    """As tpu/run.sh adds keys to those of its settings."""
    assert read("--train.steps=3", "--train.steps=2")[1].train.steps == 2


def test_no_key_is_without_a_meaning():
    assert config.meanings().keys() == config.all_keys().keys()
    for key, meaning in config.meanings().items():
        assert re.fullmatch(r"[^`\n]{8,300}\.", meaning), f"{key}: {meaning}"


def test_help_lists_every_key_with_its_default_and_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "Trains." in shown
    assert "--resume" in shown
    for key, default in config.all_keys().items():
        assert f"--{key} VALUE" in shown
        typed = ",".join(default) if isinstance(default, list) else default
        assert f"[{typed}] {config.meanings()[key]}\n" in shown


def test_reading_a_configuration_needs_no_jax():
    """A mistake is reported before a slow import, and --mesh can set up virtual devices before JAX starts."""
    code = "import sys, segzero_jax.config; sys.exit(any(m.split('.')[0] == 'jax' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_manual_lists_every_key_with_its_default():
    manual = (Path(__file__).parent.parent / "docs/configuration.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \| \S", manual, re.MULTILINE))
    assert {key: yaml.safe_load(value) for key, value in rows.items()} == dict(config.all_keys())
