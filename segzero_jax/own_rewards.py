"""Rewards of one's own: functions that ``reward.functions`` names, called with every answer beside the recipe."""

import functools
import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segzero_jax.config import ConfigError
from segzero_jax.pods import Pod
from segzero_jax.types import Example, ObjectPrompt


@dataclass(frozen=True)
class Answer:
    """A response as a reward function sees it.

    Attributes:
      text: the response, without special tokens.
      example: what was asked: ``question``, target ``objects`` and ``mask``, the encoded ``image``.
      objects: the boxes and points that the response names, in pixels of the stored picture as the target's are; none
        where it cannot be read.
      mask_iou: of SAM 2's mask for them with the target mask; None without a reward server.
      tokens: how many the response has, the one that ends it included.
      finished: whether it ended by itself rather than at ``rollout.max_response_tokens``.
    """

    text: str
    example: Example
    objects: tuple[ObjectPrompt, ...]
    mask_iou: float | None
    tokens: int
    finished: bool


# What the answer earns, its weight included. Deterministic, or a run that goes on is not the run that it was.
RewardFunction = Callable[[Answer], float]
# What ``metrics.jsonl`` says of rewards besides their components.
_MEASURED = ("mean", "std", "zero_std_groups")


def load_functions(names: Sequence[str], taken: Collection[str] = ()) -> dict[str, RewardFunction]:
    """Imports functions, each by its own name.

    Args:
      names: ``module:function``; modules are looked for as Python does, in the folder of the command first.
      taken: names of the recipe's components, which no function may have.

    Raises:
      ConfigError: one line on what cannot be imported or called. What a module raises by itself is let through.
    """
    functions: dict[str, RewardFunction] = {}
    for name in names:
        module_name, _, attribute = name.partition(":")
        if module_name.endswith(".py"):
            meant = f"{Path(module_name).stem}:{attribute or 'function'}"
            raise ConfigError(f"reward.functions: {name!r}: expected module:function, such as {meant}")
        if not module_name or module_name.startswith(".") or not attribute.isidentifier():
            raise ConfigError(f"reward.functions: {name!r}: expected module:function")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"reward.functions: {name}: there is no module {error.name}; run the command in the folder that holds "
                "it, or put that folder on PYTHONPATH"
            ) from None
        function = getattr(module, attribute, None)
        if not callable(function):
            raise ConfigError(f"reward.functions: {name}: {module.__file__ or module_name} has no function {attribute}")
        if attribute in (*taken, *_MEASURED, *functions):
            raise ConfigError(f"reward.functions: {name}: another number is called {attribute}, rename the function")
        functions[attribute] = function
    return functions


def sources(functions: Mapping[str, RewardFunction]) -> dict[str, str]:
    """SHA-256 of the file that each function is written in; of those that are written in one."""
    files = {name: _file(function) for name, function in functions.items()}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}


def _file(function: Callable[..., Any]) -> str | None:
    written = inspect.unwrap(function)
    if isinstance(written, functools.partial):
        return _file(written.func)
    try:
        return inspect.getsourcefile(written if inspect.isroutine(written) else type(written))
    except TypeError:  # built in
        return None


def check_same_files(found: Mapping[str, str], pod: Pod) -> None:
    """Raises ConfigError on all hosts where one has another file of a function than the first: each scores some rows.

    Args:
      found: ``sources``; nothing where this host has none, which it is to say itself.
    """
    if other := pod.difference("reward functions", found):
        name, host, _, _ = other
        raise ConfigError(
            f"reward.functions: the file of {name} on {pod.host(host)} is not that on {pod.host(0)}; copy it to all"
        )


def measure(functions: Mapping[str, RewardFunction], answer: Answer) -> dict[str, float]:
    """What each function gives. Raises what a function raises, with a note, and ValueError for what is no number."""
    values = {}
    for name, function in functions.items():
        where = f"reward function {name}, question {answer.example.id}"
        try:
            value = function(answer)
        except Exception as error:
            error.add_note(f"in {where}, answer {answer.text!r}")
            raise
        if not isinstance(value, int | float | np.integer | np.floating | np.bool_) or not math.isfinite(value):
            raise ValueError(f"{where}, answer {answer.text!r}: expected a finite number, got {value!r}")
        values[name] = float(value)
    return values
