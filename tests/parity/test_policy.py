"""The policy against transformers' Qwen2_5_VLForConditionalGeneration: same weights, same prompts, float32."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import encode
from torch_policy import load_torch, make_checkpoint, torch_inputs

from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.policy import ForwardConfig, prompt_logits
from segzero_jax.model.weights import resolve
from segzero_jax.processor import Processor

RELATIVE = 1e-4  # of the largest logit; a contract

CASES = {
    "text": [[]],
    "image": [[(112, 112)]],
    "partial windows": [[(140, 84)]],
    "several images": [[(112, 112), (56, 140), (28, 28)]],
    "padding": [[(112, 112)], [(84, 56), (112, 168)], []],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The toy configuration with random weights, by whether the head is tied; norms in which their epsilon counts.

    That of the vision tower is fixed: what patches are embedded as is small.
    """
    config = json.loads((resolve("toy") / "config.json").read_text()) | {"rms_norm_eps": 0.01}
    found = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("checkpoint")
        found[tied] = make_checkpoint(folder, config | {"tie_word_embeddings": tied}, scale=4)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        (name,) = (name for name in tensors if name.endswith("patch_embed.proj.weight"))
        save_file(tensors | {name: tensors[name] * 1e-3}, file, metadata={"format": "pt"})
    return found


@pytest.mark.parametrize(("case", "tied"), [*((case, True) for case in CASES), ("padding", False)])
def test_logits_equal_transformers(case: str, tied: bool, directories: dict[bool, Path]) -> None:
    processor = Processor.load(directories[tied], 112, "toy", 256)
    prompts = [encode(processor, f"where is number {n}?", sizes, n) for n, sizes in enumerate(CASES[case])]
    model = load_torch(directories[tied])
    with jax.set_mesh(make_mesh("1x1")):
        policy, dims = load_hf(directories[tied])
        fwd = ForwardConfig(dims, TRAIN, jnp.dtype("float32"))
        batch = processor.batch(prompts, multiple=8)
        ours = jax.jit(lambda policy, batch: prompt_logits(policy, batch, fwd))(policy, batch)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            theirs = model(**torch_inputs(prompt, processor)).logits[0].numpy()
        difference = np.abs(np.asarray(ours[row, : len(theirs)]) - theirs).max()
        assert difference <= RELATIVE * np.abs(theirs).max()
