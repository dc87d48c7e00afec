"""Running exported models with ONNX Runtime. Parity and benchmarks run them through the same code that
serves."""
