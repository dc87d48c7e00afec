"""The vision server. Two entry points:

- `server.serve(folder, settings, version=…, git_commit=…, max_pixels=…)` runs the process: port, model,
  signals.
- `app.create_app(model, limits)` is the ASGI application around a loaded model, for tests and for other
  servers.

Neither knows the model registry: the caller downloads a version and passes the folder, its version and its
digest; who follows an alias does so from outside, through `VisionService.load` and `switch`.

The way of a request: `gateway` (id, metrics, log line) → `app` (route) → `uploads`, `protocol` (untrusted
bytes to arrays) → `service` (admission, deadline) → `batching` (queue, the thread that runs the network).
"""
