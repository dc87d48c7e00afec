"""What a training step costs before anything is trained: arithmetic and memory, from the shapes alone."""
