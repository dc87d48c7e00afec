"""The attention worker process.

    python -m flows.serving.lamina.attention.worker --port 0 --token-file FILE [--host 127.0.0.1]

It loads nothing: an engine connects, proves itself by the run's token, and sends the sizes of the model.
The first line on stdout is JSON with the port. SIGTERM or a DRAIN frame lets the iteration under way end,
then the process exits with 0. A peer that talks nonsense gets an ERROR frame and loses its connection.
With --exit-with-stdin it ends when its stdin does, at once: whoever started it is gone.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType as StackFrame

import torch

from flows.errors import ConfigError, ResourceError, TrunklineError
from flows.serving.lamina.attention.bandwidth import copy_bandwidth
from flows.serving.lamina.attention.frames import MAX_HELLO, Frame, FrameError, FrameType, pack_json
from flows.serving.lamina.attention.session import Session, error_frame
from flows.serving.lamina.attention.transport import Link, LinkClosed, LinkTimeout
from flows.serving.lamina.lifeline import exit_with_stdin

MAX_CONNECTIONS = 32
HELLO_TIMEOUT_S = 5.0
SEND_TIMEOUT_S = 30.0
POLL_S = 0.2
MIN_TOKEN_BYTES = 16


class Server:
    """Accepts connections and lets one session answer them, one frame at a time."""

    def __init__(
        self, listener: socket.socket, token: bytes, session: Session, drain_timeout_s: float
    ) -> None:
        self.session = session
        self.stopping = threading.Event()
        self._listener, self._token, self._drain_timeout_s = listener, token, drain_timeout_s
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def serve(self) -> None:
        """Until told to stop; then until the iteration under way has ended or the time for it has."""
        self._listener.settimeout(POLL_S)
        while not self.stopping.is_set():
            try:
                connection, address = self._listener.accept()
            except TimeoutError:
                continue
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            link = Link(connection, f"{address[0]}:{address[1]}")
            threading.Thread(target=self._converse, args=(link,), daemon=True).start()
        self._listener.close()
        self.session.draining = True
        deadline = time.monotonic() + self._drain_timeout_s
        while self.session.busy and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
        with self._lock:  # the answer to the last frame leaves before the process does
            pass

    def _converse(self, link: Link) -> None:
        header = None
        try:
            self._welcome(link)
            while True:
                frame = link.receive()
                header = frame.header
                self._reply(link, frame)
        except (LinkClosed, LinkTimeout):
            pass
        except TrunklineError as error:
            self._say_goodbye(link, error_frame(header, str(error)))
        except Exception as error:  # a bug must not take the other connections along
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._say_goodbye(link, error_frame(header, f"internal error: {type(error).__name__}"))
        finally:
            link.close()
            self._slots.release()

    def _welcome(self, link: Link) -> None:
        frame = link.receive(HELLO_TIMEOUT_S, limit=MAX_HELLO)
        known = hmac.compare_digest(bytes(frame.payload), self._token)
        if frame.header.type is not FrameType.HELLO or not known:
            raise FrameError("HELLO without the token of this run")
        with self._lock:
            self.session.enter_epoch(frame.header.epoch)
            epoch = self.session.epoch
        if frame.header.epoch < epoch:
            raise FrameError(f"HELLO of epoch {frame.header.epoch}, this worker is in {epoch} already")
        link.send(frame.header, pack_json({"pid": os.getpid()}), SEND_TIMEOUT_S)

    def _reply(self, link: Link, frame: Frame) -> None:
        if frame.header.type is FrameType.PING:  # answered during work: a slow worker is not a dead one
            link.send(frame.header, frame.payload, SEND_TIMEOUT_S)
            return
        if frame.header.type is FrameType.DRAIN:
            link.send(frame.header, b"", SEND_TIMEOUT_S)
            self.stopping.set()
            return
        with self._lock:
            try:
                answer = self.session.handle(frame)
            except FrameError:
                raise
            except TrunklineError as error:  # the frame was whole, so the next one can be read
                answer = error_frame(frame.header, str(error))
            if answer is not None:
                link.send(answer.header, answer.payload, SEND_TIMEOUT_S)
            self.session.settle()

    def _say_goodbye(self, link: Link, frame: Frame) -> None:
        with suppress(TrunklineError):
            link.send(frame.header, frame.payload, 1.0)


def read_token(path: Path) -> bytes:
    """
    Raises:
        ConfigError: the file is missing or holds no usable token.
    """
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the token file {path} ({error.strerror})") from None
    if not MIN_TOKEN_BYTES <= len(token) <= MAX_HELLO:
        raise ConfigError(
            f"the token in {path} has {len(token)} bytes; "
            f"{MIN_TOKEN_BYTES} to {MAX_HELLO} random ones are needed"
        )
    return token


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serving.lamina.attention.worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0 = any free one")
    parser.add_argument("--token-file", type=Path, required=True, help="what peers have to present in HELLO")
    parser.add_argument("--max-bytes", type=int, default=1 << 30, help="for keys and values")
    parser.add_argument("--threads", type=int, default=1, help="requests computed at the same time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drain-timeout-s", type=float, default=10.0)
    parser.add_argument(
        "--share-port", action="store_true", help="the port is held by whoever starts this process again"
    )
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when stdin does")
    arguments = parser.parse_args(argv)
    if arguments.exit_with_stdin:
        exit_with_stdin()
    torch.set_num_threads(1)  # bits of a row must not depend on how BLAS shares work out
    try:
        token = read_token(arguments.token_file)
        try:
            listener = socket.create_server(
                (arguments.host, arguments.port),
                family=socket.AF_INET6 if ":" in arguments.host else socket.AF_INET,
                reuse_port=arguments.share_port,
            )
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {arguments.host}:{arguments.port} ({error.strerror}); choose another port"
            ) from None
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    session = Session(arguments.max_bytes, arguments.threads, arguments.device)
    session.prepare()
    session.copy_bytes_per_s = copy_bandwidth(arguments.threads, arguments.device)
    server = Server(listener, token, session, arguments.drain_timeout_s)

    def stop(number: int, frame: StackFrame | None) -> None:
        server.stopping.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    print(json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}), flush=True)
    server.serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
