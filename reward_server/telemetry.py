"""Prometheus metrics and log lines for operators."""

import functools
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_PREFIX = "segzero_reward"
# Idle timeout of a connection to the metrics page.
_SILENCE_S = 30.0
# Timeout for stopping the metrics page.
_STOP_S = 5.0
_log = logging.getLogger(__name__)


class Metrics:
    """The metrics of one server, in its own registry.

    Attributes:
      requests: finished calls, by method and gRPC status.
      candidates: answered candidates, by status ("OK", "INVALID_ARGUMENT", …).
      queue_seconds, compute_seconds: seconds per call in the queue and on the device (for its whole batch).
      call_seconds: latency per call that ended with OK, from arrival to answer, image decoding included.
      batch_size: calls per batch.
      encoded, hits: images encoded, and calls whose image was encoded already.
      out_of_memory: batches that did not fit into GPU memory.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Calls answered", "method", "code")
        self.candidates = self._counter("candidates", "Candidates answered", "code")
        self.queue_seconds = self._histogram("queue_seconds", "Seconds that a call waited for a device", _SECONDS)
        self.compute_seconds = self._histogram("compute_seconds", "Seconds that a call's batch took", _SECONDS)
        meaning = "Seconds from an answered call's arrival to its answer"
        self.call_seconds = self._histogram("call_seconds", meaning, _SECONDS)
        self.batch_size = self._histogram("batch_size", "Calls in a batch", _SIZES)
        self.encoded = self._counter("images_encoded", "Pictures that went through the encoder")
        self.hits = self._counter("cache_hits", "Calls whose picture was encoded already")
        self.out_of_memory = self._counter("out_of_memory", "Batches that did not fit the GPU's memory")

    def watch(self, name: str, meaning: str, read: Callable[[], float], **labels: str) -> None:
        """Adds a gauge that is read at every scrape."""
        gauge = Gauge(f"{_PREFIX}_{name}", meaning, list(labels), registry=self.registry)
        (gauge.labels(**labels) if labels else gauge).set_function(read)

    def watch_memory(self, devices: list[torch.device]) -> None:
        """Adds gauges of the memory that PyTorch holds on each GPU."""
        gpus = [device for device in devices if device.type == "cuda"]
        if not gpus:
            return
        for name, read in (("allocated", torch.cuda.memory_allocated), ("reserved", torch.cuda.memory_reserved)):
            meaning = f"Bytes that PyTorch has {name} on a GPU"
            gauge = Gauge(f"{_PREFIX}_gpu_memory_{name}_bytes", meaning, ["device"], registry=self.registry)
            for device in gpus:
                gauge.labels(device=str(device)).set_function(functools.partial(read, device))

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", meaning, buckets=bounds, registry=self.registry)


def expose(
    metrics: Metrics, host: str, port: int, tls: tuple[Path, Path] | None, client_ca: Path | None = None
) -> tuple[int, Callable[[], None]]:
    """Serves ``/metrics`` over HTTP, or over HTTPS if ``tls`` is given; ``client_ca`` then restricts the clients.

    Returns the port (a free one for 0) and a function that stops the server. Raises OSError if it cannot listen there.
    """
    certificate, key = (str(tls[0]), str(tls[1])) if tls else (None, None)
    address = host.strip("[]")
    server: Any
    server, thread = start_http_server(
        *(port, address, metrics.registry, certificate, key),
        client_cafile=str(client_ca) if client_ca else None,
        client_auth_required=client_ca is not None,
    )
    if tls:
        # Otherwise the single accept thread also does the handshake, and a silent client blocks it.
        server.socket.do_handshake_on_connect = False
    server.RequestHandlerClass = type("Handler", (server.RequestHandlerClass,), {"timeout": _SILENCE_S})
    server.handle_error = _note_failed

    def stop() -> None:
        # ``shutdown`` waits for the accept thread, without a timeout of its own.
        asking = threading.Thread(target=server.shutdown, daemon=True)
        asking.start()
        asking.join(_STOP_S)
        server.server_close()
        thread.join(_STOP_S)

    return server.server_port, stop


def _note_failed(request: object, peer: object) -> None:
    """Logs a failed connection at debug level: it is the client's error, such as plain text to a page with TLS."""
    _log.debug("metrics page: connection from %s", peer, exc_info=True)


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON: time, level, logger, message, and its extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(as_json: bool) -> None:
    """Sends this package's lines from INFO on, and all warnings, to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if as_json else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    logging.getLogger("reward_server").setLevel(logging.INFO)
