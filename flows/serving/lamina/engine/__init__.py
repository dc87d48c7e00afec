"""The engine: batching, memory, sampling, journal and recovery around slices and attention workers."""
