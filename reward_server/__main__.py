"""``python -m reward_server``: loads a SAM 2 and serves it until a signal ends it (exit code 0), or a device dies (1).

Prints one line on standard output once it listens, ``{"listening": "127.0.0.1:50051"}``; logs go to standard error.
The standard health service reports NOT_SERVING for the reward service until the model is loaded and warm.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from reward_server.access import Access
    from reward_server.server import RewardServer

_PARENT_POLL_S = _SIGNAL_POLL_S = 0.5
_SWITCH_S = 0.0005
_DAY_S = 86_400
_EXAMPLES = """
examples:
  python -m reward_server --model toy
      the small model in this package, for this machine alone
  python -m reward_server --device cuda --host 0.0.0.0 --tls-cert chain.pem --tls-key key.pem --token-file token
      SAM 2.1 large on a GPU, encrypted, for whoever has the token
  python -m reward_server --model sam2.1_hiera_large.pt --device cuda:0,cuda:1 --metrics-port 9090
      a checkpoint file on two GPUs, with a page for Prometheus
"""


_BOUNDS = [
    ("port", 0, 65535),
    ("metrics-port", 0, 65535),
    ("threads", 0, 4096),
    ("max-batch", 1, 256),
    ("max-delay-ms", 0, 10_000),
    ("max-queue", 1, 4096),
    ("max-batch-seconds", 1, _DAY_S),
    ("cache-mib", 0, math.inf),
    ("drain-seconds", 0, _DAY_S),
]


def main() -> int:
    """Runs the command; returns its exit code: 2 after one line that says what it cannot do, 1 for a dead device."""
    args = _parse()
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    # The signal mask is inherited: if the parent blocks signals, this process would never be told to stop.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
    if args.exit_with_parent is not None:
        if os.getppid() != args.exit_with_parent:
            return _failed(
                f"--exit-with-parent={args.exit_with_parent}: expected this process's parent, {os.getppid()}"
            )
        threading.Thread(target=_watch_parent, args=(args.exit_with_parent,), daemon=True).start()
    if args.log_json:
        # gRPC logs a plain-text line for each connection without TLS; the server's own errors stay.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Imported here, since signals are handled by now, and before the model's libraries, which take seconds to import.
    from reward_server.access import AccessError

    try:
        access = _access(args)
    except AccessError as error:
        return _failed(str(error))
    # If the extra is not installed, this gives one line rather than a traceback.
    try:
        import torch

        from reward_server.segmenter import ModelError
        from reward_server.telemetry import log_to_stderr
    except ModuleNotFoundError as error:
        how = "in a clone, pip install -c constraints.txt -e '.[reward]', then SAM 2 as requirements-sam2.txt says"
        return _failed(f"{error.name} is not installed: {how}")
    log_to_stderr(args.log_json)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if _serve(args, access):
            return 0
    except (ModelError, OSError) as error:
        return _failed(str(error))
    # CUDA's own clean-up at Python's end may wait for a device that hangs.
    sys.stderr.flush()
    os._exit(1)


def _access(args: argparse.Namespace) -> "Access":
    """The checked access settings. Raises AccessError."""
    from reward_server.access import Access, read_token

    access = Access(
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        client_ca=args.client_ca,
        token=read_token(args.token_file) if args.token_file else "",
        insecure=args.insecure,
    )
    access.check_address(args.host)
    access.credentials()
    return access


def _serve(args: argparse.Namespace, access: "Access") -> bool:
    """Serves until a signal has come, or a device has died: False. Announces its addresses as one line of JSON."""
    from reward_server.segmenter import Segmenter
    from reward_server.server import RewardServer, Settings

    settings = Settings(
        host=args.host,
        port=args.port,
        access=access,
        max_batch=args.max_batch,
        max_delay_s=args.max_delay_ms / 1000,
        max_queue=args.max_queue,
        max_batch_s=args.max_batch_seconds,
        cache_bytes=args.cache_mib * 2**20,
        drain_s=args.drain_seconds,
        reflection=args.reflection,
        metrics_port=args.metrics_port,
    )
    # A model's thread reacquires the GIL after every PyTorch operation; a thread that decodes a request should not make
    # it wait for the default 5 ms.
    sys.setswitchinterval(_SWITCH_S)
    devices = args.device.split(",")
    server = RewardServer(settings, len(devices))
    _servers.append(server)
    try:
        listening = {"listening": server.address}
        if server.metrics_address:
            listening["metrics"] = server.metrics_address
        print(json.dumps(listening), flush=True)
        server.serve([Segmenter.load(args.model, device, args.config, args.compile) for device in devices])
        # Python runs signal handlers only in this thread. If a library blocks signals here, another thread receives
        # them, which does not wake this one: a wait without a timeout would never notice.
        while not (_signals or server.dead):
            time.sleep(_SIGNAL_POLL_S)
    finally:
        server.stop()
    return not server.dead


def _parse() -> argparse.Namespace:
    parser = _Parser(
        prog="python -m reward_server",
        description="The SAM 2 reward service: masks for boxes and points, and their IoU with a target, over gRPC.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="facebook/sam2.1-hiera-large",
        metavar="MODEL",
        help="a hub id, a checkpoint file, a directory with config.yaml and model.safetensors, or toy [%(default)s]",
    )
    model.add_argument("--config", default="", help="a checkpoint file's configuration; published ones need none")
    model.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, cuda:0,cuda:1, or auto: a GPU where there is one"
    )
    model.add_argument("--compile", action="store_true", help="compile the image encoder: a slow start, then faster")
    model.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves it to PyTorch")
    listen = parser.add_argument_group("listening")
    listen.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    listen.add_argument("--port", type=int, default=50051, help="0 picks a free one [%(default)s]")
    listen.add_argument("--metrics-port", type=int, metavar="PORT", help="serve /metrics to Prometheus")
    listen.add_argument("--reflection", action="store_true", help="tell callers what the service offers")
    access = parser.add_argument_group("access")
    access.add_argument("--tls-cert", type=Path, metavar="PEM", help="the server's certificate chain: turns TLS on")
    access.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    access.add_argument("--client-ca", type=Path, metavar="PEM", help="clients must show a certificate signed by these")
    access.add_argument("--token-file", type=Path, metavar="FILE", help="calls must bring the token in this file")
    access.add_argument("--insecure", action="store_true", help="allow other than loopback addresses without TLS")
    _add_pace(parser)
    args = parser.parse_args()
    for option, low, high in _BOUNDS:
        value = getattr(args, option.replace("-", "_"))
        if value is not None and not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            parser.error(f"--{option}={value}: expected {expected}")
    return args


def _add_pace(parser: argparse.ArgumentParser) -> None:
    """Adds the options for batch and queue sizes and for time limits."""
    batching = parser.add_argument_group("batching")
    batching.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="requests a device gets at once [%(default)s]"
    )
    batching.add_argument(
        "--max-delay-ms", type=float, default=5, metavar="MS", help="how long they gather [%(default)s]"
    )
    batching.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="requests that may wait [%(default)s]"
    )
    batching.add_argument(
        "--max-batch-seconds",
        type=float,
        default=300,
        metavar="S",
        help="if no request of a batch is answered for this long, its device counts as hanging [%(default)s]",
    )
    batching.add_argument(
        "--cache-mib", type=int, default=256, metavar="MIB", help="of embeddings, per device [%(default)s]"
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--drain-seconds",
        type=float,
        default=10,
        metavar="S",
        help="how long calls may take to finish once it stops [%(default)s]",
    )
    running.add_argument("--log-json", action="store_true", help="log lines of JSON")
    running.add_argument(
        "--exit-with-parent", type=int, metavar="PID", help="stop when this process, which started this one, is gone"
    )


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage, which --help prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reward_server: {message}\n")


# The server once it exists, and the signals received since it serves.
_servers: list["RewardServer"] = []
_signals: list[int] = []


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Ends the process in good order; further signals do not cut that short.

    Raises nothing, since the interrupted code, such as an import of PyTorch, might catch it or be left half done.
    """
    if not any(server.serves for server in _servers):
        os._exit(0)
    # Python itself drops this handler at the end of its shutdown.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _signals.append(number)


def _watch_parent(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _failed(reason: str) -> int:
    print(f"reward_server: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
