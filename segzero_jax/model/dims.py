"""The dimensions of a Qwen2.5-VL policy, read from and written as Hugging Face's config.json."""

from dataclasses import dataclass, replace
from typing import Any

_ROPE_THETA = 1e6


class ModelConfigError(ValueError):
    """The config.json is not a Qwen2.5-VL's, or a field is missing or invalid; the message is one line."""


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
        """Values in one patch: channels x temporal patch x height x width."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def window_side(self) -> int:
        """Patches along one side of an attention window."""
        return self.window // self.patch

    @property
    def window_slots(self) -> int:
        """Patches in a full attention window."""
        return self.window_side**2

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
      ModelConfigError: another architecture, a field is missing or not a number, or the sizes are inconsistent.
    """
    if config.get("model_type") != "qwen2_5_vl":
        raise ModelConfigError(f"config.json: model_type {config.get('model_type')!r}: expected 'qwen2_5_vl'")
    text, vision = config, _section(config, "vision_config")
    if "text_config" in config:
        text = _section(config, "text_config")
    rope = _section(text, "rope_parameters") or _section(text, "rope_scaling")
    _check_kind(config, text, vision, rope)
    # transformers ties weights if the root or, in its older nested files, text_config sets it.
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    dims = Dims(
        vocab=_whole(text, "vocab_size"),
        hidden=_whole(text, "hidden_size"),
        layers=_whole(text, "num_hidden_layers"),
        heads=_whole(text, "num_attention_heads"),
        kv_heads=_whole(text, "num_key_value_heads"),
        mlp=_whole(text, "intermediate_size"),
        mrope_sections=_wholes(rope, "mrope_section", None),
        tied=bool(tied),
        rope_theta=_real(rope, "rope_theta", _real(text, "rope_theta", _ROPE_THETA)),
        norm_eps=_real(text, "rms_norm_eps", None),
        vision=VisionDims(
            hidden=_whole(vision, "hidden_size"),
            # transformers 4.49 writes only values that differ from its class's defaults, which have never changed.
            depth=_whole(vision, "depth", 32),
            heads=_whole(vision, "num_heads", 16),
            mlp=_whole(vision, "intermediate_size", 3420),
            out=_whole(vision, "out_hidden_size", 3584),
            patch=_whole(vision, "patch_size", 14),
            temporal_patch=_whole(vision, "temporal_patch_size", 2),
            merge=_whole(vision, "spatial_merge_size", 2),
            window=_whole(vision, "window_size", 112),
            full_attention=_wholes(vision, "fullatt_block_indexes", (7, 15, 23, 31)),
            channels=_whole(vision, "in_channels", _whole(vision, "in_chans", 3)),
        ),
    )
    _check(dims)
    return dims


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A parsed config.json with this dtype of the weights, in either of the two forms."""
    if "text_config" not in config:
        return config | {"torch_dtype": dtype}
    parts = {key: config[key] | {"dtype": dtype} for key in ("text_config", "vision_config") if key in config}
    return {key: value for key, value in config.items() if key != "torch_dtype"} | parts | {"dtype": dtype}


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ModelConfigError(f"config.json: {key} is {value!r}: expected an object")
    return value


def _field(section: dict[str, Any], key: str, default: Any) -> Any:
    value = section.get(key, default)
    if value is None:
        raise ModelConfigError(f"config.json: {key!r} is missing: expected a Qwen2.5-VL configuration")
    return value


def _whole(section: dict[str, Any], key: str, default: int | None = None) -> int:
    value = _field(section, key, default)
    if type(value) is not int or value < 1:
        raise ModelConfigError(f"config.json: {key} is {value!r}: expected a whole number above 0")
    return value


def _wholes(section: dict[str, Any], key: str, default: tuple[int, ...] | None) -> Any:
    value = _field(section, key, default)
    if not isinstance(value, (list, tuple)) or not all(type(item) is int and item >= 0 for item in value):
        raise ModelConfigError(f"config.json: {key} is {value!r}: expected a list of whole numbers")
    return tuple(value)


def _real(section: dict[str, Any], key: str, default: float | None) -> float:
    value = _field(section, key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ModelConfigError(f"config.json: {key} is {value!r}: expected a number above 0")
    return float(value)


def _check_kind(config: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuses configurations that are computed or stored differently from this implementation."""
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("mrope", "default"):
        raise ModelConfigError(f"config.json: rope scaling {kind!r}: expected plain M-RoPE ('mrope' or 'default')")
    for section in (text, vision):
        if section.get("hidden_act", "silu") != "silu":
            raise ModelConfigError(f"config.json: hidden_act {section['hidden_act']!r}: expected 'silu'")
    if text.get("use_sliding_window"):
        raise ModelConfigError("config.json: use_sliding_window is true: expected full attention in every layer")
    if config.get("quantization_config"):
        method = _section(config, "quantization_config").get("quant_method")
        raise ModelConfigError(f"config.json: the weights are quantized ({method}): expected the plain checkpoint")


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
    if len(dims.mrope_sections) != 3:
        raise ModelConfigError(f"config.json: mrope_section {list(dims.mrope_sections)}: expected three numbers")
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
# Dimensions of the presets' models by hub id, from their config.json, for planning without their files.
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
