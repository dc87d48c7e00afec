"""The HTTP process of Lamina: claim the port, read the tokenizer, answer until told to stop.

    with listening_socket(settings.http.host, settings.http.port, "lamina.http") as listener:
        bundle = read_bundle(folder)
        ... start engine and attention workers ...
        serve(bundle, settings, socket_path, listener=listener, hooks=Hooks(on_worker_lost=...))

`listening_socket` is that of `flows.serving.listening`. SIGTERM and SIGINT are caught inside of `serve` only:
once, answers end within `http.drain_timeout_s`; twice, at once. `serve` then returns, and the caller ends its
processes. It must run in the main thread.
"""

from __future__ import annotations

import socket
from pathlib import Path

from flows.params.language import Lamina
from flows.serving.lamina.api.hooks import Hooks
from flows.serving.lamina.slices.bundle import Bundle


def serve(
    bundle: Bundle,
    settings: Lamina,
    socket_path: Path,
    *,
    listener: socket.socket | None = None,
    name: str | None = None,
    version: str | None = None,
    hooks: Hooks | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then answer what is in flight, send the engine `Drain` and return.

    Args:
        bundle: of which the tokenizer and the sizes are used here.
        settings: section `lamina` of params.yaml.
        socket_path: of the engine; it need not exist yet.
        listener: a port that is claimed already; default: `http.host` and `http.port`.
        name: of the model for clients; default: the bundle's.
        version: of the model in the registry, shown by /version and /v2.
        hooks: see `hooks.Hooks`.

    Raises:
        ResourceError: the port is taken or not allowed.
        ConfigError: the host is not an address of this machine, or `http.api_key_file` is of no use.
        DataError: the bundle has no usable tokenizer.
        TrunklineError: what `Running.fail` was given.
    """
    raise NotImplementedError
