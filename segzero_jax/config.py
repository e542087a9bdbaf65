"""The configuration: frozen dataclasses, a YAML preset, dotted overrides. An unknown key or a bad value is one line.

``Config()`` is the embedded toy run. A YAML file holds what differs from it, and
``--section.key=value`` overrides both.
"""

import argparse
import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: the key, the value, what was expected."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Where a run lives."""

    dir: Text = "runs/toy"


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The policy.

    Attributes:
      path: a Hugging Face checkpoint: a directory, a hub id, or "toy" for the one inside the package; see ``hub.py``.
      compute_dtype: of activations and of the weights that rollout reads; master weights are always float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
      freeze_vision: leave the vision tower and merger untouched.
    """

    path: Text = "toy"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    freeze_vision: bool = False


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """What is asked.

    Attributes:
      name: "toy".
      dir: where built data sets are kept.
      image_size: pictures are squashed to this many pixels squared; answers are in this frame.
      prompt: whose question wording: see ``prompt.py``.
      eval_splits: held-out splits that are evaluated.
    """

    name: Text = "toy"
    dir: Text = "~/.cache/segzero_jax"
    image_size: Annotated[int, Field(gt=0, multiple_of=28)] = 112
    prompt: Literal["toy", "seg_zero", "vision_reasoner"] = "toy"
    eval_splits: tuple[Text, ...] = ("val", "heldout_pairs", "heldout_relations", "heldout_crowd")


@dataclass(frozen=True, config=_STRICT)
class RolloutConfig:
    """How responses are sampled."""

    group_size: Annotated[int, Field(ge=2)] = 8
    temperature: Above0 = 1.0
    top_p: Fraction = 1.0
    top_k: Count = 0
    max_prompt_tokens: Positive = 64
    max_response_tokens: Positive = 64


@dataclass(frozen=True, config=_STRICT)
class RewardConfig:
    """How responses are scored.

    Attributes:
      server: "local" starts a SAM 2 server beside the trainer, "none" scores text alone, else "host:port[,host:port]".
      recipe: see ``rewards.py``.
      mask_iou_weight: weight of the SAM 2 mask IoU component added to the recipe's own; 0 leaves it out.
      mask_iou_mode: the component's form: the IoU itself, 1 above 0.5, or SAM-R1's tiers.
      local_model: the SAM 2 model that a local server loads: "toy" or a hub id.
      timeout_s: how long one call for a group's scores may take; then it is sent again.
      missing: what becomes of a group that the service did not answer in time while it answered others: the step
        waits for it, or its responses are dropped from the loss.
      checkpoint_after_s: after so long without any answer, a checkpoint of the last finished step is saved.
      patience_s: after so long the run ends, with exit code 3.
      ca_file: PEM certificates that vouch for the servers'; turns TLS on.
      cert_file, key_file: the trainer's own certificate and key in PEM, for servers that ask for them.
      token_file: holds the word that servers ask for; over plain text it is sent to this machine only.
      tls_name: the name in the servers' certificates where it is not the host in ``server``.
    """

    server: Text = "local"
    recipe: Literal["seg_zero_soft", "seg_zero_strict", "vision_reasoner", "sam_r1"] = "vision_reasoner"
    mask_iou_weight: NonNegative = 1.0
    mask_iou_mode: Literal["raw", "threshold", "tiered"] = "raw"
    local_model: Text = "toy"
    timeout_s: Above0 = 120.0
    missing: Literal["wait", "drop"] = "wait"
    checkpoint_after_s: Above0 = 300.0
    patience_s: Above0 = 3600.0
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    token_file: str = ""
    tls_name: str = ""


@dataclass(frozen=True, config=_STRICT)
class GrpoConfig:
    """The loss. Defaults are the paper's but for the toy run's KL.

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      kl_coef: weight of the k3 estimate of KL(policy, reference).
      entropy_coef: weight of the entropy bonus.
      importance_cap: truncate the sampler-to-trainer importance weight here; 0 leaves it out.
    """

    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    kl_coef: NonNegative = 5e-3
    entropy_coef: NonNegative = 0.0
    importance_cap: NonNegative = 0.0


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """The optimizer and the schedule.

    Attributes:
      steps: updates in all.
      batch_size: prompts a step.
      micro_batch_size: prompts whose activations live at once; gradients accumulate over the rest.
      moment_dtype: of AdamW's first moment; the second stays float32: with beta2 near 1 a bfloat16 one would stall.
      checkpoint_every: steps between checkpoints; one is always written at the end.
      keep_checkpoints: older ones are deleted.
    """

    steps: Positive = 120
    batch_size: Positive = 16
    micro_batch_size: Positive = 16
    lr: NonNegative = 1e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    weight_decay: NonNegative = 1e-2
    max_grad_norm: Above0 = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = 2


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """Evaluation on held-out splits before, during and after training.

    Attributes:
      every: steps between evaluations, 0 for only before and after.
      examples: questions per split.
      samples: sampled answers per question, beside the greedy one.
    """

    every: Count = 0
    examples: Positive = 64
    samples: Positive = 8


@dataclass(frozen=True, config=_STRICT)
class Config:
    """Everything a run depends on. ``--mesh=4x4`` is fsdp x tensor, ``--mesh=2x4x4`` data x fsdp x tensor."""

    seed: Count = 0
    mesh: Text = "1x1"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.train.batch_size % self.train.micro_batch_size:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size}: expected a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size}"
            )
        if self.reward.recipe == "sam_r1" and self.reward.server == "none":
            raise ConfigError("reward.recipe=sam_r1: scores masks, expected reward.server=local or host:port, got none")
        if self.reward.server not in ("local", "none") and not all(map(_is_target, self.reward.server.split(","))):
            raise ConfigError(f"reward.server={self.reward.server}: expected local, none or host:port[,host:port]")


_ADAPTER = TypeAdapter(Config)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML-ready values."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    """The resolved configuration as it is written to ``config.yaml``."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


@functools.cache
def all_keys() -> Mapping[str, Any]:
    """Every dotted key with its default."""
    return MappingProxyType(dict(_flatten(to_dict(Config()))))


def build(tree: dict[str, Any], source: str = "config") -> Config:
    """Validates nested values into a Config. Raises ConfigError, naming ``source``, for the first thing wrong."""
    for key, value in _flatten(tree):
        _check_key(key, source)
        if isinstance(value, bool) and not isinstance(all_keys()[key], bool):  # "train.steps: yes" is not one step
            raise ConfigError(f"{source}: {key}={value}: expected {type(all_keys()[key]).__name__}, got a yes or no")
    try:
        return _ADAPTER.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise ConfigError(f"{source}: {cause}") from None
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{source}: {key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML preset and applies ``a.b=value`` overrides (values are YAML).

    Raises:
      ConfigError: the file is missing or not YAML, a key is unknown, or a value is not what the key expects.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"--config={path}: no such file; presets are in configs/")
        try:
            tree = yaml.load(Path(path).read_bytes(), _UniqueKeyLoader) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected sections with keys, got {type(tree).__name__}")
        build(tree, str(path))
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise ConfigError(f"--{key}: expected --{key}=value")
        _check_key(key, "command line")
        value = _override_value(key, text)
        section = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return build(tree, "command line" if overrides else str(path or "config"))


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """Reads ``argv`` with ``parser``'s options, ``--config`` and every dotted key; bad input is one line and exit 2."""
    parser = OneLineParser(
        prog=parser.prog,
        usage=parser.usage or "%(prog)s [options] [--config FILE] [--section.key=value ...]",
        description=parser.description,
        epilog=parser.epilog,
        formatter_class=parser.formatter_class,
        parents=[parser],
        add_help=False,  # the parent's
        allow_abbrev=False,  # --train.step is a mistake, not --train.steps
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML preset, see configs/; without it the embedded toy run")
    keys = parser.add_argument_group("configuration (default in brackets)")
    for key, default in all_keys().items():
        keys.add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=f"[{default}]")
    args, unknown = parser.parse_known_args(argv)
    try:
        for item in unknown:
            _check_key(item.lstrip("-").partition("=")[0], "command line")
            raise ConfigError(f"command line: unexpected {item!r}: expected --key=value")
        overrides = [f"{key}={value}" for key, value in vars(args).items() if key in all_keys()]
        return args, load(args.config, overrides)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


class OneLineParser(argparse.ArgumentParser):
    """A command line that reports a mistake in one line, without repeating the usage of fifty options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: plain YAML would silently drop the first, with its whole section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"{key!r} is given twice" if isinstance(key, str) else f"expected a name as key, got {key!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _override_value(key: str, text: str) -> Any:
    """What ``--key=text`` means: the text itself where text is expected ("2026" is a name), YAML elsewhere."""
    if isinstance(all_keys()[key], str):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_target(target: str) -> bool:
    host, _, port = target.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536


def _flatten(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_key(key: str, source: str) -> None:
    known = all_keys()
    sections = {name.rpartition(".")[0] for name in known} - {""}
    if key in known:
        return
    if key in sections:
        raise ConfigError(
            f"{source}: {key}: is a section, expected keys such as {next(k for k in known if k.startswith(key + '.'))}"
        )
    elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = elsewhere or difflib.get_close_matches(key, known, n=1)
    raise ConfigError(
        f"{source}: unknown key {key!r}" + (f", did you mean {close[0]!r}?" if close else "; --help lists the keys")
    )


def differing_keys(left: Config, right: Config) -> list[str]:
    """Dotted keys whose values differ."""
    a, b = dict(_flatten(to_dict(left))), dict(_flatten(to_dict(right)))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def replace(config: Config, **changes: Any) -> Config:
    """A copy with dotted keys changed: ``replace(config, **{"train.steps": 2})``."""
    tree = to_dict(config)
    for key, value in changes.items():
        _check_key(key, "replace")
        *parents, leaf = key.split(".")
        section = tree
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return build(tree)
