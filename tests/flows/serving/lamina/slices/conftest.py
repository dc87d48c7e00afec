"""Models of several families, traced once."""

from __future__ import annotations

import pytest
import tiny_llama2c
from tiny_decoders import FAMILIES, Sliced, slice_model


@pytest.fixture(scope="session", params=list(FAMILIES))
def sliced(request: pytest.FixtureRequest) -> Sliced:
    with tiny_llama2c.one_thread():
        return slice_model(request.param)
