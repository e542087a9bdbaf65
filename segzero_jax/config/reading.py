"""Reads a configuration from a YAML preset, dotted overrides, a command line. A mistake is reported in one line.

A YAML file holds what differs from the embedded toy run, and ``--section.key=value`` overrides both.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

from segzero_jax.config.checks import check_answer_form
from segzero_jax.config.schema import Config, ConfigError

_ADAPTER = TypeAdapter(Config)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain YAML-ready values."""
    return _ADAPTER.dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    """The resolved configuration as written to ``config.yaml``."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


@functools.cache
def all_keys() -> Mapping[str, Any]:
    """Every dotted key with its default."""
    return MappingProxyType(flat(Config()))


@functools.cache
def meanings() -> Mapping[str, str]:
    """The meaning of every dotted key: its entry in the Attributes of its section's docstring."""
    config = Config()
    found = _attributes(type(config))
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            found |= {f"{field.name}.{name}": text for name, text in _attributes(type(section)).items()}
    return MappingProxyType(found)


def _attributes(documented: type) -> dict[str, str]:
    _, _, listed = (inspect.getdoc(documented) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for names, text in re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", listed, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.replace("``", "").split()))
    return found


def build(tree: dict[str, Any], source: str = "config") -> Config:
    """Validates nested values into a Config. Raises ConfigError, naming ``source``, for the first mistake."""
    for key in tree:
        section, _, name = key.rpartition(".")
        if section and key in all_keys():
            raise ConfigError(f"{source}: {key}: expected the key {name} in the section {section}")
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
        key, value = ".".join(str(part) for part in first["loc"]), first["input"]
        problem = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        if first["type"] == "tuple_type":
            problem = f"expected a list, [{value if isinstance(value, str) else ''}]"
        raise ConfigError(f"{source}: {key}={value!r}: {problem}") from None


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
            tree = yaml.load(Path(path).read_bytes(), _PresetLoader) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected sections with keys, got {type(tree).__name__}")
        try:
            build(tree, str(path))
        except RecursionError:
            raise ConfigError(f"{path}: a section refers to itself") from None
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
    """Reads ``argv`` with ``parser``'s options, ``--config`` and every dotted key; bad input is one line and exit 2.

    It is the command line of a run: a valid configuration that cannot be trained is bad input as well.
    """
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
    parser.add_argument(
        "--config",
        action=_Preset,
        type=os.path.expanduser,  # shells do not expand --config=~/a.yaml
        metavar="FILE",
        help="a YAML preset, see configs/; without it the embedded toy run",
    )
    keys = parser.add_argument_group("configuration (default in brackets)")
    for key, default in all_keys().items():
        typed = ",".join(default) if isinstance(default, list) else default
        told = f"[{typed}] {meanings().get(key, '')}".replace("%", "%%")
        keys.add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=told)
    args, unknown = parser.parse_known_args(argv)
    try:
        for item in unknown:
            _check_key(item.lstrip("-").partition("=")[0], "command line")
            raise ConfigError(f"command line: unexpected {item!r}: expected --key=value")
        overrides = [f"{key}={value}" for key, value in vars(args).items() if key in all_keys()]
        config = load(args.config, overrides)
        check_answer_form(config)
        return args, config
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


class OneLineParser(argparse.ArgumentParser):
    """A command line that reports a mistake in one line, without repeating the usage of fifty options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


class _Preset(argparse.Action):
    """Refuses a second preset, which would silently replace the first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        first = getattr(namespace, self.dest)
        if first is not None:
            parser.error(
                f"--config={value}: --config={first} is given already, expected one preset, which holds all that "
                "differs from the toy run; change keys of it by --section.key=value"
            )
        setattr(namespace, self.dest, value)


def count(text: str) -> int:
    """A count of at least one, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
    return int(text)


class _PresetLoader(yaml.SafeLoader):
    """Refuses a key that is given twice: plain YAML would silently drop the first, with its whole section.

    An invalid date and a number of thousands of digits are reported like other YAML mistakes, with their position.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError) as error:  # the latter for a value that is tagged as a date but is not one
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # Keys from "<<" may be given again: they are defaults.
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"{key!r} is given twice" if isinstance(key, str) else f"expected a name as key, got {key!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _override_value(key: str, text: str) -> Any:
    """The value of ``--key=text``: the text itself if text is expected ("2026" is a name), else YAML."""
    if isinstance(all_keys()[key], str):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for an invalid date, or a number of thousands of digits
        return text


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


def flat(config: Config) -> dict[str, Any]:
    """All values by their dotted keys."""
    return dict(_flatten(to_dict(config)))


def differing_keys(left: Config, right: Config) -> list[str]:
    """Dotted keys whose values differ."""
    a, b = flat(left), flat(right)
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
