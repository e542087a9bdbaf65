"""The Qwen2.5-VL policy in Flax: one set of weights, prefix-grouped passes, Hugging Face checkpoints in and out."""

from segzero_jax.model.weights import load_hf, save_hf

__all__ = ["load_hf", "save_hf"]
