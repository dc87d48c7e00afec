"""From a Hugging Face decoder to a bundle of ONNX slices, and back to text.

The way of an export: `loading` (folder → model, or a refusal by name) → `tracing` (model → one graph with a
marker per attention) → `cutting` (which values each boundary keeps) → `programs` (QX, KVX and POST graphs)
→ `onnx_graphs` (ONNX files, one for all layers that are alike) → `export` (bundle, checked against the
model). `bundle` reads what `export` wrote, `runner` runs it with attention in this process.
"""
