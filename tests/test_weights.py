"""Hugging Face directories in and out: both key forms, shards, casts, and what is said of a damaged one."""

import json
from pathlib import Path

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
from segzero_jax.model.weights import CheckpointError


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


def damage(directory: Path, case: str) -> str:
    """Damages a checkpoint; returns what must be said of it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    if case == "missing":
        del tensors[key]
    elif case == "extra":
        key = "model.layers.7.mlp.up_proj.weight"
        tensors[key] = np.zeros((2, 2), np.float32)
    elif case == "misshapen":
        tensors[key] = np.ascontiguousarray(tensors[key].T)
    elif case == "dtype":
        tensors[key] = tensors[key].astype(np.int8)
    save_file(tensors, file)
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "model.safetensors"
    return key


@pytest.mark.parametrize("case", ["missing", "extra", "misshapen", "dtype", "truncated"])
def test_a_damaged_checkpoint_is_named(saved: Path, case: str) -> None:
    named = damage(saved, case)
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError) as error:
        load_hf(saved)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_config_errors_name_the_file(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    for broken, said in (({**config, "model_type": "llama"}, "llama"), ({}, "model_type")):
        (saved / "config.json").write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=said):
            load_hf(saved)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_hf(saved / "nowhere")
