"""An engine process that answers `hello world` to everything, until it is drained."""

import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

from fake_engine import fake_engine
from served_texts import END, byte_level

from flows.serving.lamina.requests import Drain

if __name__ == "__main__":
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(75)), daemon=True).start()
    config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    with fake_engine(Path(config["socket"])) as engine:
        engine.script.reply = [*byte_level().encode("hello world").ids, END]
        while not any(isinstance(message, Drain) for message in engine.received):
            time.sleep(0.02)
