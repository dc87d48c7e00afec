"""Devices, a model and traces for tests of the simulator; figures of no device that exists."""

import datetime

import numpy as np

from flows.serving.lamina.simulator.inputs import Device, Model, Network, read_policy
from flows.serving.lamina.simulator.steps import Costs, SetUp
from flows.serving.lamina.simulator.traces import Trace

NETWORK = Network(one_way_us=10.0, gb_s=20.0)


def device(**changes):
    values = {
        "tflops": 100.0,
        "memory_gb": 10.0,
        "memory_gb_s": 1000.0,
        "price_per_hour": 2.0,
        "price_date": datetime.date(2026, 1, 1),
        "mfu": 0.5,
        "mbu_w": 0.8,
        "mbu_a": 0.7,
    }
    return Device(**(values | changes))


def small_model(**changes):
    values = {
        "name": "small",
        "parameters": 1_000_000_000,
        "layers": 10,
        "hidden_size": 1024,
        "heads": 16,
        "kv_heads": 8,
        "head_size": 64,
        "bytes_per_element": 2.0,
        "vocab_size": 1000,
        "max_context": 100_000,
    }
    return Model(**(values | changes))


USUAL = read_policy(None)


def policy(**changes):
    return USUAL.model_copy(update=changes)


def lamina(a=1, b=2, n=1, partition="head", **changes):
    memory = device(
        memory_gb=changes.pop("memory_gb", 4.0),
        memory_gb_s=changes.pop("memory_gb_s", 1000.0),
        tflops=20.0,
        price_per_hour=0.5,
    )
    return SetUp("big", device(), a, "small", memory, b, n, partition, **changes)


def costs(set_up=None, model=None, network=NETWORK, **changes):
    chosen = set_up or lamina(redundancy=changes.get("redundancy", "none"))
    return Costs(model or small_model(), chosen, network, policy(**changes))


def trace(lengths, arrivals=None, name="test"):
    prompts, outputs = zip(*lengths, strict=True)
    when = np.zeros(len(prompts)) if arrivals is None else np.array(arrivals, dtype=np.float64)
    return Trace(name, when, np.array(prompts), np.array(outputs))
