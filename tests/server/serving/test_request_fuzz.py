"""Whatever comes over gRPC or HTTP is answered, by a result or an error, and nobody else is disturbed."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.stress import fuzz_on_the_wire

FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    with fuzz_on_the_wire.fuzzed_server(tmp_path_factory.mktemp("fuzzed")) as wire:
        yield wire


@FEW
@given(batch=st.lists(fuzz_on_the_wire.messages(), min_size=8, max_size=8))
def test_no_grpc_message_breaks_the_server(wire, batch):
    wire.check_grpc(batch)


@FEW
@given(batch=st.lists(fuzz_on_the_wire.bodies(), min_size=4, max_size=4))
def test_no_http_body_breaks_the_server(wire, batch):
    wire.check_http(batch)
