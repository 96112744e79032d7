"""Whatever a client sends, it gets an answer, or an error that is its own fault, and nobody else is disturbed."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.stress import fuzz_in_process
from benchmarks.stress.request_surface import cases


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with fuzz_in_process.ready_model(tmp_path_factory.mktemp("fuzzed")) as model:
        yield model


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(batch=st.lists(cases(), min_size=5, max_size=5))
def test_no_request_breaks_the_model(served, batch):
    fuzz_in_process.check(served, batch)
