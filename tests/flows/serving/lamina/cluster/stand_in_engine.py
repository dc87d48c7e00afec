"""An engine that computes nothing: its socket and its ways to end, which `bundle` in its config chooses.

It counts its starts in a file beside its socket, and says `error: …` before it exits with a code.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path


def main():
    assert "--exit-with-stdin" in sys.argv
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(75)), daemon=True).start()
    config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    path = Path(config["socket"])
    with open(path.parent / "starts", "a") as starts:
        starts.write(json.dumps({"pid": os.getpid(), "workers": config["workers"]}) + "\n")
    what, _, value = Path(config["bundle"]).name.partition(":")
    if what == "exit":
        print("loading", file=sys.stderr)
        print("error: the stand-in cannot load its bundle", file=sys.stderr)
        return int(value)
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        while True:
            time.sleep(10)


if __name__ == "__main__":
    raise SystemExit(main())
