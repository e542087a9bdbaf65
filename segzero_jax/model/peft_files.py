"""Adapters in PEFT's format: a safetensors file and ``adapter_config.json`` (github.com/huggingface/peft)."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from segzero_jax.model.hf_layout import ENTRIES
from segzero_jax.model.lora import MATRICES, Adapters
from segzero_jax.model.tensor_files import save_tensors
from segzero_jax.model.weights import ADAPTER_CONFIG

# The key prefix from PEFT's wrappers and the decoder in transformers 5.
_PREFIX = "base_model.model.model.language_model."
# The vision tower's blocks have projections of the same names, which are not adapted.
_TARGETS = r".*\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def save_peft(
    adapters: Adapters, directory: Path, *, rank: int, alpha: float, base: str, dtype: Any = jnp.float32
) -> list[Path]:
    """Writes adapters that ``peft.PeftModel.from_pretrained(base_model, directory)`` loads.

    Args:
      adapters: adapters as a run trains them, without the factor ``alpha / rank``.
      directory: an existing directory.
      rank, alpha: ``model.lora_rank`` and ``model.lora_alpha``.
      base: the base model, a directory or a hub id, where PEFT's ``Auto`` classes look for it.
      dtype: the dtype that the adapters are rounded to.

    Returns:
      The files written.
    """
    tensors = {}
    for name in MATRICES:
        adapter = getattr(adapters, name)
        down, up = (np.asarray(part[...]).astype(np.dtype(dtype)) for part in (adapter.down, adapter.up))
        down, up = down.reshape(len(down), -1, rank), up.reshape(len(up), rank, -1)
        for layer, key in enumerate(ENTRIES["blocks", name].keys(down.shape)):
            module = _PREFIX + key.removeprefix("model.").removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(down[layer].T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(up[layer].T)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _TARGETS,
        "inference_mode": True,
    }
    files = [directory / "adapter_model.safetensors", directory / ADAPTER_CONFIG]
    save_tensors(tensors, files[0])
    files[1].write_text(json.dumps(config, indent=2) + "\n")
    return files
