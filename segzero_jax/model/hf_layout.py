"""The place of every parameter of the policy's tree in Hugging Face files: key, axis order, and factoring of axes."""

import math
from dataclasses import dataclass

from segzero_jax.model.dims import Dims


@dataclass(frozen=True)
class Entry:
    """The layout of one parameter in the file.

    Attributes:
      hf: hub key, with ``{}`` for the layer if the parameter is stacked.
      factors: for each axis in the file, the number of axes that hold it in the tree.
      transposed: whether it is a torch Linear: ``[out, in]`` in the file, ``[in, out]`` in the tree.
    """

    hf: str
    factors: tuple[int, ...] = (1,)
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    def keys(self, shape: tuple[int, ...]) -> list[str]:
        """The hub keys of a parameter with ``shape`` in the tree: one, or one for each layer."""
        return [self.hf.format(layer) for layer in range(shape[0])] if self.stacked else [self.hf]

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation from the file's axes, after factoring, to the tree's."""
        axes, first = tuple(range(sum(self.factors))), self.factors[0]
        return axes[first:] + axes[:first] if self.transposed else axes

    def factored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tree's shape in the axis order of the file."""
        return tuple(shape[self.order.index(axis)] for axis in range(len(shape)))

    def file_shape(self, shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
        """The shape in the file of a parameter with ``shape`` in the tree."""
        vision = dims.vision
        if self.hf.endswith("patch_embed.proj.weight"):  # a convolution
            return (vision.hidden, vision.channels, vision.temporal_patch, vision.patch, vision.patch)
        rest = iter(self.factored(shape))
        return tuple(math.prod(next(rest) for _ in range(count)) for count in self.factors)


def _linear(hf: str, out_axes: int = 1, in_axes: int = 1) -> Entry:
    return Entry(hf, (out_axes, in_axes), transposed=True)


def _bias(hf: str, axes: int = 1) -> Entry:
    return Entry(hf, (axes,))


ENTRIES: dict[tuple[str, ...], Entry] = {
    ("embed_vd",): Entry("model.embed_tokens.weight", (1, 1)),
    ("head_vd",): Entry("lm_head.weight", (1, 1)),
    ("final_norm_d",): Entry("model.norm.weight"),
    ("blocks", "norm1_d"): Entry("model.layers.{}.input_layernorm.weight"),
    ("blocks", "norm2_d"): Entry("model.layers.{}.post_attention_layernorm.weight"),
    ("blocks", "q_dnh"): _linear("model.layers.{}.self_attn.q_proj.weight", out_axes=2),
    ("blocks", "q_bias_nh"): _bias("model.layers.{}.self_attn.q_proj.bias", 2),
    ("blocks", "k_dkh"): _linear("model.layers.{}.self_attn.k_proj.weight", out_axes=2),
    ("blocks", "k_bias_kh"): _bias("model.layers.{}.self_attn.k_proj.bias", 2),
    ("blocks", "v_dkh"): _linear("model.layers.{}.self_attn.v_proj.weight", out_axes=2),
    ("blocks", "v_bias_kh"): _bias("model.layers.{}.self_attn.v_proj.bias", 2),
    ("blocks", "o_nhd"): _linear("model.layers.{}.self_attn.o_proj.weight", in_axes=2),
    ("blocks", "gate_df"): _linear("model.layers.{}.mlp.gate_proj.weight"),
    ("blocks", "up_df"): _linear("model.layers.{}.mlp.up_proj.weight"),
    ("blocks", "down_fd"): _linear("model.layers.{}.mlp.down_proj.weight"),
    ("vision", "patch_cd"): _linear("visual.patch_embed.proj.weight"),
    ("vision", "blocks", "norm1_d"): Entry("visual.blocks.{}.norm1.weight"),
    ("vision", "blocks", "norm2_d"): Entry("visual.blocks.{}.norm2.weight"),
    ("vision", "blocks", "qkv_d3nh"): _linear("visual.blocks.{}.attn.qkv.weight", out_axes=3),
    ("vision", "blocks", "qkv_bias_3nh"): _bias("visual.blocks.{}.attn.qkv.bias", 3),
    ("vision", "blocks", "out_nhd"): _linear("visual.blocks.{}.attn.proj.weight", in_axes=2),
    ("vision", "blocks", "out_bias_d"): _bias("visual.blocks.{}.attn.proj.bias"),
    ("vision", "blocks", "gate_df"): _linear("visual.blocks.{}.mlp.gate_proj.weight"),
    ("vision", "blocks", "gate_bias_f"): _bias("visual.blocks.{}.mlp.gate_proj.bias"),
    ("vision", "blocks", "up_df"): _linear("visual.blocks.{}.mlp.up_proj.weight"),
    ("vision", "blocks", "up_bias_f"): _bias("visual.blocks.{}.mlp.up_proj.bias"),
    ("vision", "blocks", "down_fd"): _linear("visual.blocks.{}.mlp.down_proj.weight"),
    ("vision", "blocks", "down_bias_d"): _bias("visual.blocks.{}.mlp.down_proj.bias"),
    ("vision", "merger_norm_d"): Entry("visual.merger.ln_q.weight"),
    ("vision", "merger_up_df"): _linear("visual.merger.mlp.0.weight"),
    ("vision", "merger_up_bias_f"): _bias("visual.merger.mlp.0.bias"),
    ("vision", "merger_down_fd"): _linear("visual.merger.mlp.2.weight"),
    ("vision", "merger_down_bias_d"): _bias("visual.merger.mlp.2.bias"),
}


def hub_key(key: str) -> str:
    """Converts a key to the hub's form; transformers 5 uses another form in memory."""
    for prefix, hub in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if key.startswith(prefix):
            return hub + key.removeprefix(prefix)
    return key
