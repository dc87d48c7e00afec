"""The vision server. Two entry points:

- `server.serve(folder, settings, version=…, git_commit=…, max_pixels=…)` runs the process: port, model,
  signals.
- `app.create_app(package, session, limits, info)` is the ASGI application around a loaded model, for tests
  and for
  other servers.

Neither knows the model registry: the caller downloads the champion and passes the folder, its version and its
digest.
"""
