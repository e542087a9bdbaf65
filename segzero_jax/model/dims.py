"""The dimensions of a Qwen2.5-VL policy, read from and written as Hugging Face's config.json."""

from dataclasses import dataclass, replace
from typing import Any

_ROPE_THETA = 1e6


class ModelConfigError(ValueError):
    """A config.json that is not a Qwen2.5-VL's, or lacks a field; one line."""


@dataclass(frozen=True)
class VisionDims:
    """The vision tower: sizes in units, ``window`` in pixels."""

    hidden: int
    depth: int
    heads: int
    mlp: int
    out: int
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    full_attention: tuple[int, ...] = (7, 15, 23, 31)
    channels: int = 3

    @property
    def patch_width(self) -> int:
        """Numbers in one patch: channels x temporal patch x height x width."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def window_slots(self) -> int:
        """Patches in a whole attention window."""
        return (self.window // self.patch) ** 2

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Dims:
    """The decoder and its vision tower."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    mrope_sections: tuple[int, int, int]
    tied: bool
    vision: VisionDims
    rope_theta: float = _ROPE_THETA
    norm_eps: float = 1e-6

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


def from_hf(config: dict[str, Any]) -> Dims:
    """Reads a parsed config.json: the flat form of the hub or the nested one that transformers 5 writes.

    Raises:
      ModelConfigError: another architecture, a field is missing, or the sizes do not go together.
    """
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelConfigError(f"config.json: model_type {config.get('model_type')!r}: expected 'qwen2_5_vl'")
    text = config.get("text_config", config)
    vision = config.get("vision_config", {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("mrope", "default"):
        raise ModelConfigError(f"config.json: rope scaling {kind!r}: expected plain M-RoPE ('mrope' or 'default')")
    try:
        dims = Dims(
            vocab=text["vocab_size"],
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            mlp=text["intermediate_size"],
            mrope_sections=tuple(rope["mrope_section"]),
            # transformers reads the tie at the root: the 3B hub file has it there.
            tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", _ROPE_THETA))),
            norm_eps=text.get("rms_norm_eps", 1e-6),
            vision=VisionDims(
                hidden=vision["hidden_size"],
                depth=vision["depth"],
                heads=vision["num_heads"],
                mlp=vision["intermediate_size"],
                out=vision["out_hidden_size"],
                patch=vision.get("patch_size", 14),
                temporal_patch=vision.get("temporal_patch_size", 2),
                merge=vision.get("spatial_merge_size", 2),
                window=vision.get("window_size", 112),
                full_attention=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
                channels=vision.get("in_channels", vision.get("in_chans", 3)),
            ),
        )
    except KeyError as error:
        raise ModelConfigError(
            f"config.json: {error.args[0]!r} is missing: expected a Qwen2.5-VL configuration"
        ) from None
    _check(dims)
    return dims


def _check(dims: Dims) -> None:
    vision = dims.vision
    for whole, part, names in (
        (dims.hidden, dims.heads, "hidden_size / num_attention_heads"),
        (dims.heads, dims.kv_heads, "num_attention_heads / num_key_value_heads"),
        (vision.hidden, vision.heads, "vision hidden_size / num_heads"),
        (vision.window, vision.patch * vision.merge, "window_size / (patch_size x spatial_merge_size)"),
    ):
        if whole % part:
            raise ModelConfigError(f"config.json: {names} = {whole} / {part}: expected a whole number")
    for left, right, names in (
        (2 * sum(dims.mrope_sections), dims.head_width, "twice the sum of mrope_section and the head width"),
        (vision.out, dims.hidden, "out_hidden_size of the vision tower and hidden_size"),
    ):
        if left != right:
            raise ModelConfigError(f"config.json: {names} are {left} and {right}: expected the same")
    stride = vision.full_attention[0] + 1 if vision.full_attention else 0
    if not stride or vision.depth % stride or vision.full_attention != tuple(range(stride - 1, vision.depth, stride)):
        raise ModelConfigError(
            f"config.json: fullatt_block_indexes {list(vision.full_attention)} of {vision.depth} vision blocks: "
            f"expected every n-th block and the last, such as [7, 15, 23, 31] of 32"
        )
    if vision.head_width % 4:
        raise ModelConfigError(f"config.json: vision head width {vision.head_width}: expected a multiple of 4")


_RELEASED_VISION = VisionDims(hidden=1280, depth=32, heads=16, mlp=3420, out=2048)
# The models that the presets name, by hub id: what their config.json says, for planning without their files.
RELEASED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Dims(
        vocab=151936,
        hidden=2048,
        layers=36,
        heads=16,
        kv_heads=2,
        mlp=11008,
        mrope_sections=(16, 24, 24),
        tied=True,
        vision=_RELEASED_VISION,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": Dims(
        vocab=152064,
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        mlp=18944,
        mrope_sections=(16, 24, 24),
        tied=False,
        vision=replace(_RELEASED_VISION, out=3584),
    ),
}
