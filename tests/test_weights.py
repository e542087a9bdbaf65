"""Hugging Face directories in and out: both key forms, shards, casts, and what is said of a damaged one."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import DIMS, hf_config, random_policy
from torch_policy import load_torch

from segzero_jax.mesh import ROLLOUT, TRAIN, make_mesh
from segzero_jax.model import load_hf, save_hf
from segzero_jax.model.dims import from_hf
from segzero_jax.model.weights import CheckpointError, read_dims


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
    theirs = load_torch(saved).state_dict()
    for key, value in written.items():
        inside = key.replace("visual.", "model.visual.", 1) if key.startswith("visual.") else key
        inside = inside.replace("model.", "model.language_model.", 1) if not key.startswith("visual.") else inside
        assert torch.equal(theirs[inside], torch.from_numpy(value)), key


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
    elif case == "twice":
        save_file({key: tensors[key]}, directory / "more.safetensors")
    save_file(tensors, file)
    if case == "truncated":
        file.write_bytes(whole[:-100])
    elif case == "truncated header":
        file.write_bytes(whole[:1000])
    elif case == "empty":
        file.write_bytes(b"")
    elif case == "a pointer to the file":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif case == "not JSON inside":
        file.write_bytes(whole[:8] + b"?" * (len(whole) - 8))
    elif case == "no file":
        file.unlink()
        return "no *.safetensors file"
    elif case == "absent part":
        index.write_text(json.dumps({"weight_map": {key: "model-00002-of-00002.safetensors"}}))
        return "model-00002-of-00002.safetensors"
    elif case == "broken index":
        index.write_text("{")
        return index.name
    else:
        return key
    return "model.safetensors"


DAMAGES = ["missing", "extra", "misshapen", "split otherwise", "dtype", "twice"]
DAMAGES += ["truncated", "truncated header", "empty", "a pointer to the file", "not JSON inside"]
DAMAGES += ["no file", "absent part", "broken index"]


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named(saved: Path, case: str) -> None:
    named = damage(saved, case)
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError) as error:
        load_hf(saved)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


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
