"""Seg-Zero on TPU: a Qwen2.5-VL policy that reasons about where to look, trained by GRPO."""

__version__ = "0.1.0"
