"""`trunkline ui`: the pages of Prefect (runs) and MLflow (records, models), until Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from flows import services, tracking
from flows.errors import ResourceError
from flows.params import Params
from flows.ports import require_free

HOST = "127.0.0.1"


def show(params: Params, prefect_port: int, mlflow_port: int) -> None:
    """Run both servers in the foreground.

    Raises:
        ResourceError: a port is in use, or a server ended by itself.
    """
    for port in (prefect_port, mlflow_port):
        require_free(HOST, port)
    tracking.client(params)  # creates the store when nothing has run yet
    # a terminal that is closed and a plain `kill` must not leave the servers behind
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.default_int_handler)
    environment = {
        **os.environ,
        **services.mlflow_environment(params),
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    }
    processes = {
        name: subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for name, command in server_commands(params, prefect_port, mlflow_port).items()
    }
    try:
        print(f"Prefect  http://{HOST}:{prefect_port}   runs, stages, logs")
        print(f"MLflow   http://{HOST}:{mlflow_port}   metrics, pictures, models")
        print("Ctrl-C stops both.", flush=True)
        while True:
            for name, process in processes.items():
                if process.poll() is not None:
                    raise ResourceError(f"the {name} server ended with exit code {process.returncode}")
            time.sleep(1)
    except KeyboardInterrupt:
        print()
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def server_commands(params: Params, prefect_port: int, mlflow_port: int) -> dict[str, list[str]]:
    """How each server is started, by its name."""
    return {
        "Prefect": services.prefect_command(HOST, prefect_port),
        "MLflow": services.mlflow_command(params, HOST, mlflow_port),
    }
