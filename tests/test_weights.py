"""Hugging Face directories in and out: key forms, shards, casts, memory, hosts, and what is said of a damaged one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hub_checkpoint import SIZES, hub_config, hub_shapes, write_hub_checkpoint
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tiny import DIMS, hf_config, random_policy
from torch_policy import load_torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from segzero_jax import train
from segzero_jax.hub import TOY
from segzero_jax.mesh import ROLLOUT, TRAIN, make_mesh
from segzero_jax.model import load_hf, save_hf, tensor_files, weights
from segzero_jax.model.dims import RELEASED, from_hf, with_dtype
from segzero_jax.model.hf_layout import hub_key
from segzero_jax.model.tensor_files import write_tensors
from segzero_jax.model.weights import CheckpointError, abstract_policy, read_dims

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(random_policy(), DIMS, tmp_path, dtype=np.float32)
    return tmp_path


def same(left: object, right: object) -> bool:
    return all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
@pytest.mark.parametrize("layout", [TRAIN, ROLLOUT], ids=lambda layout: layout.name)
def test_a_round_trip_is_bit_equal_on_every_mesh(saved: Path, mesh: str, layout: object) -> None:
    with jax.set_mesh(make_mesh(mesh)):
        loaded, dims = load_hf(saved, layout)
        assert dims == DIMS
        assert same(loaded, random_policy(layout=layout))


def test_transformers_loads_what_we_write_bit_equal(saved: Path) -> None:
    written = load_file(saved / "model.safetensors")
    theirs = {hub_key(key): value for key, value in load_torch(saved).state_dict().items()}
    for key, value in written.items():
        assert torch.equal(theirs[key], torch.from_numpy(value)), key


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=lambda dtype: dtype.__name__)
def test_every_bit_comes_through(saved: Path, tmp_path: Path, dtype: Any) -> None:
    """Denormal numbers and minus zero too, which a device may flush."""
    rng, file = np.random.default_rng(0), saved / "model.safetensors"

    def any_finite(shape: tuple[int, ...]) -> np.ndarray:
        width = np.dtype(dtype).itemsize
        values = np.frombuffer(rng.bytes(int(np.prod(shape)) * width), dtype).reshape(shape).copy()
        with np.errstate(invalid="ignore"):
            values[~np.isfinite(values)] = -0.0
        tiny = rng.random(shape) < 0.2
        values[tiny] = np.frombuffer(rng.integers(1, 99, shape, f"u{width}").tobytes(), dtype).reshape(shape)[tiny]
        return values

    save_file({key: any_finite(value.shape) for key, value in load_file(file).items()}, file)
    with jax.set_mesh(make_mesh("2x2")):
        save_hf(load_hf(saved)[0], DIMS, tmp_path / "out", dtype=dtype)
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(file)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key].tobytes() != theirs[key].tobytes()] == []


@pytest.mark.parametrize("name", list(SIZES))
def test_the_released_layouts_are_read_in_full_depth(name: str, tmp_path: Path) -> None:
    """Every key and shape: those of transformers' model, those that a policy is filled from. No number is stored."""
    size = SIZES[name]
    config = hub_config(size)
    shapes = hub_shapes(size)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    theirs = {hub_key(key): tuple(value.shape) for key, value in model.state_dict().items()}
    if size.tied:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert shapes == theirs

    assert from_hf(config) == next(dims for hub_id, dims in RELEASED.items() if name in hub_id)

    (tmp_path / "config.json").write_text(json.dumps(config))
    sparse(tmp_path / "model.safetensors", shapes)
    with jax.set_mesh(make_mesh("4x4")):
        dims = read_dims(tmp_path)
        target = abstract_policy(dims)
        found = weights._match(tmp_path, target, dims)
    assert sum(len(parameter.tensors) for parameter in found) == len(shapes)
    assert [parameter.leaf.shape for parameter in found] == [leaf.shape for leaf in jax.tree.leaves(target)]


def sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", list(SIZES))
def test_what_the_host_holds_of_a_released_checkpoint_stays_below_two_files(name: str) -> None:
    """One device's shard of one parameter in float32, on one device and on sixteen; files as on the hub, up to 4 GB."""
    size = SIZES[name]
    largest, filled = 0, 0
    for shape in hub_shapes(size).values():
        tensor = 2 * int(np.prod(shape))
        filled = tensor if filled + tensor > 4e9 else filled + tensor
        largest = max(largest, filled)
    for mesh, bound in (("1x1", 2 * largest), ("4x4", largest / 4)):
        with jax.set_mesh(make_mesh(mesh)):
            leaves = jax.tree.leaves(abstract_policy(from_hf(hub_config(size))))
            assert max(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves) < bound


PEAK = """
import re, sys
import jax
from segzero_jax.mesh import make_mesh, prepare_cpu
from segzero_jax.model import load_hf

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

prepare_cpu("4x4")
with jax.set_mesh(make_mesh(sys.argv[2])):
    load_hf("toy")
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = status("VmRSS")
    policy, _ = load_hf(sys.argv[1])
    print(status("VmHWM") - before - sum(leaf.nbytes for leaf in jax.tree.leaves(policy)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 MB in files of up to 96 MB; 500 MB as float32."""
    size = SIZES["3B"].cut(layers=3, depth=2, vocab=512, mlp=1024)
    return write_hub_checkpoint(tmp_path_factory.mktemp("large"), size, max_file_bytes=96 << 20)


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
def test_loading_holds_less_than_two_files_beside_the_weights(large: Path, mesh: str) -> None:
    """The kernel's own record of the peak, mapped pages of the files included. On a CPU the weights are in it too."""
    done = subprocess.run([sys.executable, "-c", PEAK, large, mesh], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = max(file.stat().st_size for file in large.glob("*.safetensors"))
    assert int(done.stdout) < 2 * largest


TWO_HOSTS = """
import sys
import jax, ml_dtypes, numpy as np
from segzero_jax.mesh import make_mesh, prepare_cpu
from segzero_jax.model import load_hf, save_hf
from segzero_jax.model.weights import CheckpointError

address, host, whole, damaged, out = sys.argv[1:]
prepare_cpu("1x2")
jax.distributed.initialize(address, 2, int(host))
with jax.set_mesh(make_mesh("2x2")):
    policy, dims = load_hf(whole)
    assert not policy.embed_vd[...].is_fully_addressable
    files = save_hf(policy, dims, out, dtype=np.float32)
    print("wrote", len(files))
    try:
        load_hf(damaged)
    except CheckpointError as error:
        print("said", error)
"""


def test_two_hosts_read_their_halves_and_write_one_checkpoint(saved: Path, tmp_path: Path) -> None:
    """A NaN in what the second host alone holds: it names it; the first reads all that it needs."""
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((saved / "config.json").read_bytes())
    tensors = load_file(saved / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, -1] = np.nan  # the last columns are the second host's
    save_file(tensors, damaged / "model.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, address, str(host), saved, damaged, out],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},  # two devices, not sixteen
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    try:
        (first, second), errors = zip(*(host.communicate(timeout=120) for host in hosts), strict=True)
    finally:
        for host in hosts:
            host.kill()
    said = f"{damaged}/model.safetensors: model.embed_tokens.weight holds NaN or Inf"
    assert "wrote 1\n" in first, errors
    assert "wrote 0\n" in second, errors
    assert "said" not in first
    assert f"said {said}" in second
    written = load_file(out / "model.safetensors")
    for key, value in load_file(saved / "model.safetensors").items():
        np.testing.assert_array_equal(written[key], value)


def test_in_memory_keys_and_many_files_are_read_too(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    renamed = {
        f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1): value
        for key, value in tensors.items()
    }
    (saved / "model.safetensors").unlink()
    keys = sorted(renamed)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: renamed[key] for key in part}, saved / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with jax.set_mesh(make_mesh("1x1")):
        assert same(load_hf(saved)[0], random_policy())


def test_shards_stay_below_their_limit_and_are_indexed(tmp_path: Path, saved: Path) -> None:
    out = tmp_path / "out"
    with jax.set_mesh(make_mesh("1x1")):
        policy, _ = load_hf(saved)
        files = save_hf(policy, DIMS, out, dtype=ml_dtypes.bfloat16, carry_from=saved, max_file_bytes=100_000)
        assert sum(file.suffix == ".safetensors" for file in files) > 1
        assert all(file.stat().st_size < 120_000 for file in files)
        rounded, _ = load_hf(out)
        wanted = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), policy)
        assert same(rounded, wanted)


def test_files_are_filled_to_their_limit_and_numbered_from_one(tmp_path: Path) -> None:
    tensors = {key: np.arange(size, dtype=np.float32) for key, size in {"a": 2, "b": 2, "c": 1, "d": 9, "e": 1}.items()}
    sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
    files = write_tensors(sizes, tensors.items(), tmp_path, max_file_bytes=16)
    names = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    index = json.loads(files[-1].read_text())
    assert index["weight_map"] == dict(zip("abcde", (names[i] for i in (0, 0, 1, 2, 3)), strict=True))
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert [list(load_file(file)) for file in files[:-1]] == [["a", "b"], ["c"], ["d"], ["e"]]
    # Whoever may read the index may read what it lists.
    assert {oct(file.stat().st_mode) for file in files[:-1]} == {oct(files[-1].stat().st_mode)}


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors.*: cannot be written: .*No space left") as error:
        write_tensors({"a": 4}, [("a", np.ones(1, np.float32))], tmp_path, max_file_bytes=16)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_directory_in_the_home_folder_is_there(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with jax.set_mesh(make_mesh("1x1")):
        policy, _ = load_hf(saved)
        assert save_hf(policy, DIMS, "~/policy") == [tmp_path / "policy/model.safetensors"]
    assert not (tmp_path / "~").exists()


def test_a_rewritten_directory_holds_nothing_of_the_old_weights(tmp_path: Path, saved: Path) -> None:
    """From several files with an index to one, and back; a policy that is still mapped to the old files stays."""
    out = tmp_path / "out"
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(random_policy(), DIMS, out, dtype=np.float32, carry_from=saved, max_file_bytes=100_000)
        old, _ = load_hf(out)
        save_hf(random_policy(seed=1), DIMS, out, dtype=np.float32)
        assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
        assert same(load_hf(out)[0], random_policy(seed=1))
        save_hf(random_policy(seed=2), DIMS, out, dtype=np.float32, max_file_bytes=100_000)
        assert not (out / "model.safetensors").exists()
        assert same(load_hf(out)[0], random_policy(seed=2))
        assert same(old, random_policy())


def test_weights_are_cast_on_the_way(saved: Path) -> None:
    with jax.set_mesh(make_mesh("1x1")):
        narrow, _ = load_hf(saved, dtype=ml_dtypes.bfloat16)
        assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {np.dtype(ml_dtypes.bfloat16)}
        assert same(narrow, jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), random_policy()))


def test_a_tied_head_needs_no_tensor_and_an_untied_one_does(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    with jax.set_mesh(make_mesh("1x1")):
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
        assert same(load_hf(saved)[0], random_policy())  # a file may repeat it
        save_file(tensors, file)
        (saved / "config.json").write_text(json.dumps(hf_config(tie_word_embeddings=False)))
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
            load_hf(saved)


def test_the_merger_and_heads_lie_where_torch_has_them(saved: Path) -> None:
    """Single numbers, picked by hand."""
    tensors = load_file(saved / "model.safetensors")
    with jax.set_mesh(make_mesh("1x1")):
        policy, _ = load_hf(saved)
    blocks, vision = policy.blocks, policy.vision
    assert tensors["model.layers.1.self_attn.q_proj.weight"][3 * 8 + 5, 7] == blocks.q_dnh[1, 7, 3, 5]
    assert tensors["model.layers.1.self_attn.k_proj.bias"][1 * 8 + 5] == blocks.k_bias_kh[1, 1, 5]
    assert tensors["model.layers.0.self_attn.o_proj.weight"][9, 6 * 8 + 2] == blocks.o_nhd[0, 6, 2, 9]
    assert tensors["visual.blocks.1.attn.qkv.weight"][2 * 32 + 3 * 8 + 4, 11] == vision.blocks.qkv_d3nh[1, 11, 2, 3, 4]
    flat = 2 * (2 * 14 * 14) + 1 * (14 * 14) + 5 * 14 + 6  # channel 2, time 1, row 5, column 6
    assert tensors["visual.patch_embed.proj.weight"][8, 2, 1, 5, 6] == vision.patch_cd[flat, 8]


def damage(directory: Path, case: str) -> str:
    """Damages a checkpoint; returns what must be said of it."""
    file, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    tensors, whole = load_file(file), file.read_bytes()
    key = "model.layers.1.mlp.up_proj.weight"
    if case == "missing":
        del tensors[key]
    elif case == "extra":
        key = "model.layers.7.mlp.up_proj.weight"
        tensors[key] = np.zeros((2, 2), np.float32)
    elif case == "misshapen":
        tensors[key] = np.ascontiguousarray(tensors[key].T)
    elif case == "split otherwise":  # as many numbers, in the order of memory
        tensors[key] = tensors[key].reshape(-1)
    elif case == "dtype":
        tensors[key] = tensors[key].astype(np.int8)
    elif case in ("NaN", "Inf"):
        tensors[key][3, 5] = float(case)
    elif case == "twice":
        save_file({key: tensors[key]}, directory / "more.safetensors")
    save_file(tensors, file)
    cuts = {
        "truncated": whole[:-100],
        "truncated header": whole[:1000],
        "cut behind its length": whole[:8],
        "empty": b"",
    }
    if case in cuts:
        file.write_bytes(cuts[case])
        return f"{file.name}: cut short"
    if case == "a link to nothing":
        file.unlink()
        file.symlink_to(directory / "gone")
        return f"{file.name}: No such file or directory; expected a safetensors file"
    if case == "a pointer to the file":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        return f"{file.name}: cut short, or no safetensors file"
    if case in ("too few bytes", "before the first byte"):
        length = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:length])
        ends = header[key]["data_offsets"]
        if case == "too few bytes":
            ends[1] -= 4
        else:  # As many bytes as its shape wants.
            ends[:] = [-8, ends[1] - ends[0] - 8]
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= length - 8
        file.write_bytes(whole[:8] + text.ljust(length - 8) + whole[length:])
        return f"{file.name}: {key} has "
    if case == "not JSON inside":
        file.write_bytes(whole[:8] + b"?" * (len(whole) - 8))
    elif case == "no list of tensors inside":
        file.write_bytes((7).to_bytes(8, "little") + b'{"a":1}' + whole)
    elif case == "no file":
        file.unlink()
        return "no *.safetensors file"
    elif case == "absent part":
        file.rename(directory / "model-00001-of-00002.safetensors")
        index.write_text(json.dumps({"weight_map": {key: "model-00002-of-00002.safetensors"}}))
        return "model-00002-of-00002.safetensors"
    elif case == "broken index":
        file.rename(directory / "model-00001-of-00002.safetensors")
        index.write_text("{")
        return index.name
    elif case == "index without files":
        index.write_text(json.dumps({"weight_map": {key: ["model.safetensors"]}}))
        file.rename(directory / "model-00001-of-00001.safetensors")
        return index.name
    else:
        return key
    return "model.safetensors"


DAMAGES = ["missing", "extra", "misshapen", "split otherwise", "dtype", "twice", "NaN", "Inf"]
DAMAGES += [
    "truncated",
    "truncated header",
    "cut behind its length",
    "empty",
    "a pointer to the file",
    "a link to nothing",
]
DAMAGES += ["too few bytes", "before the first byte", "not JSON inside"]
DAMAGES += ["no list of tensors inside"]
DAMAGES += ["no file", "absent part", "broken index", "index without files"]


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named(saved: Path, case: str) -> None:
    named = damage(saved, case)
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError) as error:
        load_hf(saved)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shards", ["gone", "there still"])
def test_a_whole_file_that_was_saved_over_shards_is_what_counts(saved: Path, shards: str) -> None:
    """As transformers reads it, which deletes old shards, but not their index."""
    key, old = "model.layers.1.mlp.up_proj.weight", "model-00001-of-00001.safetensors"
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, old)}))
    if shards == "there still":
        save_file({name: np.zeros_like(value) for name, value in tensors.items()}, saved / old)
    with jax.set_mesh(make_mesh("1x1")):
        policy, _ = load_hf(saved)
    np.testing.assert_array_equal(np.asarray(policy.blocks.up_df[1]).T, tensors[key])
    assert torch.equal(
        load_torch(saved).state_dict()["model.language_model.layers.1.mlp.up_proj.weight"],
        torch.from_numpy(tensors[key]),
    )


@pytest.mark.parametrize("case", ["NaN", "truncated", "missing", "another architecture"])
def test_training_does_not_begin_from_a_damaged_checkpoint(
    saved: Path, case: str, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (saved / name).write_bytes((TOY / name).read_bytes())
    if case == "another architecture":
        named = "model_type 'qwen2_vl': expected 'qwen2_5_vl'"
        (saved / "config.json").write_text(json.dumps(hf_config(model_type="qwen2_vl")))
    else:
        named = damage(saved, case)
    run = saved / "run"
    arguments = [f"--model.path={saved}", f"--run.dir={run}", f"--data.dir={data_dir}"]
    assert train.main([*arguments, "--reward.server=none"]) == 2
    said = capsys.readouterr().err.strip()
    assert named in said
    assert str(saved) in said
    assert len(said.splitlines()) == 1
    assert not run.exists()


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("name", list(SIZES))
def test_what_transformers_4_49_leaves_out_of_a_config_is_its_default(name: str) -> None:
    """It wrote what differs from its class's defaults alone: of a 7B, next to nothing of the vision tower."""
    config = hub_config(SIZES[name])
    defaults = Qwen2_5_VLConfig().vision_config.to_dict()
    vision = {key: value for key, value in config["vision_config"].items() if defaults.get(key) != value}
    assert "depth" not in vision
    assert from_hf(config | {"vision_config": vision}) == from_hf(config)


VISION = hf_config()["vision_config"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ({}, "model_type None: expected 'qwen2_5_vl'"),
        (hf_config(model_type="llama"), "model_type 'llama': expected 'qwen2_5_vl'"),
        (without(hf_config(), "num_key_value_heads"), "'num_key_value_heads' is missing"),
        (without(hf_config(), "vision_config"), "'hidden_size' is missing"),
        (without(hf_config(), "rope_scaling"), "'mrope_section' is missing"),
        (hf_config(rope_scaling={"type": "yarn", "mrope_section": [2, 1, 1]}), "rope scaling 'yarn'"),
        (hf_config(rope_scaling={"type": "mrope", "mrope_section": [4, 4, 4]}), "head width are 24 and 8"),
        (hf_config(num_attention_heads=6), "hidden_size / num_attention_heads = 64 / 6"),
        (hf_config(num_key_value_heads=3), "num_attention_heads / num_key_value_heads = 8 / 3"),
        ({**hf_config(), "vision_config": {**VISION, "out_hidden_size": 96}}, "are 96 and 64: expected the same"),
        ({**hf_config(), "vision_config": {**VISION, "window_size": 60}}, "= 60 / 28"),
        ({**hf_config(), "vision_config": {**VISION, "num_heads": 16}}, "vision head width 2"),
        ({**hf_config(), "vision_config": {**VISION, "depth": 3}}, "fullatt_block_indexes [1] of 3 vision blocks"),
        ({**hf_config(), "vision_config": {**VISION, "fullatt_block_indexes": [0]}}, "fullatt_block_indexes [0] of 2"),
        ({**hf_config(), "vision_config": {**VISION, "fullatt_block_indexes": []}}, "fullatt_block_indexes [] of 2"),
        (hf_config(num_hidden_layers="2"), "num_hidden_layers is '2': expected a whole number above 0"),
        (hf_config(vocab_size=0), "vocab_size is 0"),
        (hf_config(rms_norm_eps="small"), "rms_norm_eps is 'small': expected a number above 0"),
        (hf_config(rope_scaling=[2, 1, 1]), "rope_scaling is [2, 1, 1]: expected an object"),
        (hf_config(rope_scaling={"type": "mrope", "mrope_section": 4}), "mrope_section is 4: expected a list"),
        (hf_config(rope_scaling={"type": "mrope", "mrope_section": [2, 2]}), "mrope_section [2, 2]: expected three"),
        (hf_config(hidden_act="gelu"), "hidden_act 'gelu': expected 'silu'"),
        ({**hf_config(), "vision_config": {**VISION, "hidden_act": "gelu"}}, "hidden_act 'gelu': expected 'silu'"),
        (hf_config(use_sliding_window=True), "use_sliding_window is true"),
        (hf_config(quantization_config={"quant_method": "awq"}), "quantized (awq): expected the plain checkpoint"),
    ],
)
def test_config_errors_name_the_file_and_what_is_wrong(tmp_path: Path, text: Any, said: str) -> None:
    (tmp_path / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(CheckpointError) as error:
        read_dims(tmp_path)
    assert said in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_no_directory_is_said() -> None:
    with pytest.raises(CheckpointError, match=r"^model\.path=nowhere: no config\.json there; expected .* or 'toy'$"):
        load_hf("nowhere")


def test_the_form_that_transformers_writes_is_read(saved: Path) -> None:
    nested = load_torch(saved).config.to_dict()
    assert "text_config" in nested
    assert from_hf(json.loads(json.dumps(nested))) == DIMS


def test_config_says_what_the_weights_are_in_both_forms() -> None:
    flat, nested = hf_config(torch_dtype="bfloat16"), Qwen2_5_VLConfig.from_dict(hf_config(torch_dtype="bfloat16"))
    for config in (flat, json.loads(json.dumps(nested.to_dict()))):
        for dtype in ("float32", "bfloat16"):
            read = Qwen2_5_VLConfig.from_dict(with_dtype(config, dtype))
            assert {str(read.dtype), str(read.text_config.dtype)} == {f"torch.{dtype}"}
            assert from_hf(with_dtype(config, dtype)) == DIMS


@pytest.mark.parametrize("nested", [False, True])
def test_the_head_is_tied_where_transformers_ties_it(nested: bool) -> None:
    config = without(hf_config(), "tie_word_embeddings")
    for root in (None, False, True):
        for inner in (None, False, True) if nested else (None,):
            said = config if root is None else config | {"tie_word_embeddings": root}
            if nested:
                said = {**said, "text_config": config if inner is None else config | {"tie_word_embeddings": inner}}
            theirs = Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(said)))
            assert from_hf(said).tied == theirs.tie_word_embeddings, (root, inner)
