"""What the tests of the metrics page share: a server that keeps what is written, and an engine that is ready."""

import pytest
from support.telemetry.page import READY, ServerPage

from nanoflow_backend.telemetry.metrics import Metrics


@pytest.fixture
def server():
    return ServerPage()


@pytest.fixture
def metrics():
    return Metrics(READY)
