"""Custom rewards: functions named in ``reward.functions``, called with every answer in addition to the recipe."""

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
      example: the question's ``question``, target ``objects`` and ``mask``, and the encoded ``image``.
      objects: the boxes and points in the response, in pixels of the stored image as the target's are; empty if it
        cannot be read.
      mask_iou: IoU of SAM 2's mask for them with the target mask; None without a reward server.
      tokens: tokens of the response, including the one that ends it.
      finished: whether it ended by itself rather than at ``rollout.max_response_tokens``.
    """

    text: str
    example: Example
    objects: tuple[ObjectPrompt, ...]
    mask_iou: float | None
    tokens: int
    finished: bool


# Returns the answer's reward, weight included. Must be deterministic, or a resumed run is not the same run.
RewardFunction = Callable[[Answer], float]
# Reward metrics in ``metrics.jsonl`` besides the components.
_MEASURED = ("mean", "std", "zero_std_groups")


def load_functions(names: Sequence[str], taken: Collection[str] = ()) -> dict[str, RewardFunction]:
    """Imports functions, each by its own name.

    Args:
      names: ``module:function``; modules are looked up as Python does, in the folder of the command first.
      taken: names of the recipe's components, which no function may have.

    Raises:
      ConfigError: one line on what cannot be imported or called. Errors that a module itself raises propagate.
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
    """SHA-256 of each function's source file, for functions that have one."""
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
    """Raises ConfigError on all hosts if a function's file differs from host 0's: each host scores some rows.

    Args:
      found: ``sources``; empty if this host has none, which it must report itself.
    """
    if other := pod.difference("reward functions", found):
        name, host, _, _ = other
        raise ConfigError(
            f"reward.functions: the file of {name} on {pod.host(host)} is not that on {pod.host(0)}; copy it to all"
        )


def measure(functions: Mapping[str, RewardFunction], answer: Answer) -> dict[str, float]:
    """The value of each function. Raises a function's errors, with a note, and ValueError if it is not a number."""
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
