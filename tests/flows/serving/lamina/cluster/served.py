"""`trunkline` without a model: a manifest alone, and the engine that the first argument names."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

from served_texts import manifest

from flows import cli, lamina
from flows.serving.lamina.cluster.supervisor import Supervisor
from flows.serving.lamina.slices.bundle import Bundle

if __name__ == "__main__":
    engine = Path(__file__).with_name(sys.argv.pop(1))
    lamina.read_bundle = lambda folder: Bundle(folder, manifest())
    lamina.digest_of = lambda bundle: "of nothing"
    lamina.Supervisor = partial(Supervisor, command=[sys.executable, str(engine)])
    cli.main()
