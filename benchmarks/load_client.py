"""Closed-loop load on a server: so many connections, each asks again as soon as it is answered.

    python -m benchmarks.load_client HOST PORT BODY_FILE --path P --header NAME=VALUE … \\
        --connections N --seconds S

A process of its own, pinned by its caller; plain sockets in one event loop, because every cycle spent here is
not spent by the server. Prints one JSON line: requests answered, their latencies, and how many failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path


async def ask_again(
    host: str, port: int, request: bytes, until: float, answers: list[tuple[float, int]]
) -> None:
    """One connection; appends (seconds, status) of each answer."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**24)
    try:
        while (started := time.perf_counter()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            )
            await reader.readexactly(length)
            answers.append((time.perf_counter() - started, int(head[9:12])))
    finally:
        writer.close()


async def load(host: str, port: int, request: bytes, connections: int, seconds: float) -> dict[str, object]:
    answers: list[tuple[float, int]] = []
    started = time.perf_counter()
    await asyncio.gather(
        *(ask_again(host, port, request, started + seconds, answers) for _ in range(connections))
    )
    return {
        "seconds": time.perf_counter() - started,
        "latencies_s": [seconds for seconds, status in answers if status == 200],
        "failed": sum(status != 200 for _, status in answers),
    }


def build_request(host: str, path: str, headers: list[str], body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    lines += [header.replace("=", ": ", 1) for header in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("body", type=Path)
    parser.add_argument("--path", required=True)
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    request = build_request(arguments.host, arguments.path, arguments.header, arguments.body.read_bytes())
    run = load(arguments.host, arguments.port, request, arguments.connections, arguments.seconds)
    print(json.dumps(asyncio.run(run)))


if __name__ == "__main__":
    main()
