"""Command-line options that ``infer`` and ``evaluate`` share: the policy, its prompt, and the mask server."""

import argparse
import math
import sys

from segzero_jax.config import ConfigError, OneLineParser, RewardConfig, check_wording
from segzero_jax.reward_channel import Access, read_access
from segzero_jax.terminal import write_line

_ACCESS = {
    "ca_file": "PEM certificates that the server's is verified against; turns TLS on",
    "cert_file": "own certificate in PEM, for a server that asks for one",
    "key_file": "its private key in PEM",
    "token_file": "file with the token that the server requires",
    "tls_name": "the name in the server's certificate where it is not the host in --server",
}


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """``--image-size`` and ``--prompt``, which override a run's own, and ``--repetition-penalty``."""
    add = parser.add_argument
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the picture for the policy [as in training; 840 for Hugging Face checkpoints]",
    )
    add(
        "--prompt",
        type=_wording,
        metavar="W",
        help="wording of the question: toy, seg_zero, vision_reasoner, or a text with {question} in it "
        "[as in training; seg_zero or vision_reasoner by a checkpoint's name]",
    )
    add(
        "--repetition-penalty",
        type=above_zero,
        default=1.0,
        metavar="X",
        help="as in transformers' generate, for tokens of prompt and answer; the released evaluations have the 1.05 of "
        "Qwen2.5's generation_config.json [%(default)s: none]",
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """``--server``, ``--sam`` and the certificates and token that a server requires."""
    add = parser.add_argument
    add(
        *("--server", "--reward.server"),
        default="local",
        type=_server,
        metavar="S",
        help="who makes the mask: local starts a SAM 2 server, host:port uses one, none does without [%(default)s]",
    )
    for key, meaning in _ACCESS.items():
        add(f"--reward.{key}", dest=key, default="", metavar="F", help=meaning)
    add(
        "--sam",
        metavar="MODEL",
        help="what a local server loads: toy, a hub id or a directory [the run's own, toy for toy, hiera-large]",
    )


def access_from(args: argparse.Namespace) -> Access:
    """The certificates and token given by ``add_server_options``. Raises RewardServerError."""
    return read_access(RewardConfig(server=args.server, **{key: getattr(args, key) for key in _ACCESS}))


def above_zero(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def seed(text: str) -> int:
    """A seed, for argparse."""
    if not text.isdecimal() or not int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to {2**32 - 1}")
    return int(text)


def say(text: str) -> None:
    """Prints a line that may come from a model or a file name; nothing in it can control the terminal."""
    write_line(sys.stdout, shown(text))


def shown(text: str) -> str:
    """Text with its control characters escaped, except for newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def complain(parser: OneLineParser, error: BaseException) -> int:
    """Prints the error to standard error in one line; returns the exit code, 2."""
    write_line(sys.stderr, f"{parser.prog}: {one_line(error)}")
    return 2


def one_line(error: BaseException) -> str:
    """An error's message in one line, for standard error."""
    return " ".join(str(error).split())[:500]


def _wording(text: str) -> str:
    try:
        check_wording(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _server(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected local, none or host:port, got nothing")
    return text
