"""Everything that moves: orchestration, data, training, serving. Models live in the package `models`."""
