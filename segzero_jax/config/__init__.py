"""The configuration: frozen dataclasses, a YAML preset, dotted overrides. An unknown key or a bad value is one line."""

from segzero_jax.config.reading import (
    OneLineParser,
    all_keys,
    build,
    differing_keys,
    load,
    parse_command_line,
    replace,
    to_dict,
    to_yaml,
)
from segzero_jax.config.schema import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    WatchConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GrpoConfig",
    "ModelConfig",
    "OneLineParser",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "WatchConfig",
    "all_keys",
    "build",
    "differing_keys",
    "load",
    "parse_command_line",
    "replace",
    "to_dict",
    "to_yaml",
]
