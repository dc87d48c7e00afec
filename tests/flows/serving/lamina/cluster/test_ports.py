"""A port stays a worker's own while the worker is away."""

import socket

import pytest

from flows.errors import ResourceError
from flows.serving.lamina.cluster.ports import hold_port, hold_port_in

HOST = "127.0.0.1"


def test_a_held_port_refuses_at_once_and_is_for_its_worker_only():
    with hold_port(HOST) as holder:
        port = holder.getsockname()[1]
        for _ in range(2):  # also after a worker was there
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, port), 5)
            with pytest.raises(OSError, match="in use"):
                socket.create_server((HOST, port))
            with socket.create_server((HOST, port), reuse_port=True) as worker:
                client = socket.create_connection((HOST, port), 5)
                accepted, _ = worker.accept()
                accepted.close()  # the worker's side ends first and lingers
                client.close()
    socket.create_server((HOST, port)).close()


def test_two_services_do_not_get_the_same_port():
    with hold_port(HOST) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ResourceError, match=f"cannot claim {HOST}:{port}"):
            hold_port(HOST, port)
        with pytest.raises(ResourceError, match=f"no port from {port} to {port} is free"):
            hold_port_in(HOST, port, port)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(ResourceError, match="cannot claim 192"):
        hold_port("192.0.2.1")
