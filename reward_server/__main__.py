"""``python -m reward_server``: loads a SAM 2 and serves it until SIGTERM or SIGINT, then exits with 0.

Prints one line on standard output once it listens, ``{"listening": "127.0.0.1:50051"}``; logs go to standard error.
The standard health service answers NOT_SERVING until the model is loaded and warm.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

_PARENT_POLL_S = 0.5


def main() -> int:
    """Runs the command; returns its exit code: 2 for what it cannot do, after one line that says why."""
    args = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # The predictor announces every image on the root logger.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("reward_server").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    if args.exit_with_parent is not None:
        threading.Thread(target=_watch_parent, args=(args.exit_with_parent,), daemon=True).start()
    # Here, not above: without the extra this is one line rather than a traceback, and signals are handled by now.
    try:
        import torch

        from reward_server.segmenter import ModelError
        from reward_server.server import serve
    except ModuleNotFoundError as error:
        how = "pip install 'segzero-jax[reward]', then SAM 2 as requirements-sam2.txt says"
        return _failed(f"{error.name} is not installed: {how}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        serve(args.host, args.port, args.model, args.device)
    except (ModelError, OSError) as error:
        return _failed(str(error))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reward_server", description="The SAM 2 reward service.")
    parser.add_argument(
        "--model",
        default="facebook/sam2.1-hiera-large",
        help="toy, a hub id, or a directory with config.yaml and model.safetensors [%(default)s]",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: a GPU where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    parser.add_argument("--port", type=int, default=50051, help="0 picks a free one [%(default)s]")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the model; 0 leaves it to PyTorch")
    parser.add_argument(
        "--exit-with-parent", type=int, metavar="PID", help="stop when this process, which started this one, is gone"
    )
    args = parser.parse_args()
    if not 0 <= args.port <= 65535:
        parser.exit(2, f"reward_server: --port={args.port}: expected 0 to 65535\n")
    if args.threads < 0:
        parser.exit(2, f"reward_server: --threads={args.threads}: expected 0 or more\n")
    return args


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Ends the main thread in good order, wherever it is; further signals do not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(0)


def _watch_parent(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _failed(reason: str) -> int:
    print(f"reward_server: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
