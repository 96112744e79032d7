"""Which batches are worth a plan, and how they are cut."""

import pytest
from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.batch_sizes import batch_mix, checked_sizes, chunk_tokens, natural_tokens, suitable_sizes
from nanoflow_search.cost.workload import Mix
from nanoflow_search.request import SearchRequest
from support.places import LLAMA_3_8B


def request_for(*workloads: str) -> SearchRequest:
    return SearchRequest.of(LLAMA_3_8B, 1, workloads or ("512/1024",))


def test_sizes_follow_the_memory() -> None:
    of_8b = request_for()
    natural = natural_tokens(of_8b.size, "NVIDIA H200", 1, of_8b.parsed[0])
    assert natural == pytest.approx(1.5 * (141e9 - 16.06e9) / 131072 / 1024, rel=0.01)
    assert suitable_sizes([natural]) == of_8b.sizes("NVIDIA H200") == (1024, 1280, 2048)
    assert suitable_sizes([1e9]) == (4096,)
    assert suitable_sizes([10.0]) == (512,)
    with pytest.raises(SearchError, match="dense-batch-tokens: say one; the device is not in"):
        of_8b.sizes("NVIDIA GTX 970")


def test_no_more_tokens_decode_than_the_memory_holds() -> None:
    workload = request_for().parsed[0]
    assert batch_mix(workload, 300, 600.0) == Mix(200, 100, 1024.0, 256)
    assert batch_mix(workload, 900, 600.0) == Mix(400, 500, 1024.0, 256)


def test_chunks_are_whole_tiles() -> None:
    sizes = (256, 768, 1280, 1536, 2048, 3072, 4096)
    assert [chunk_tokens(tokens) for tokens in sizes] == [128, 128, 128, 256, 256, 512, 512]
    assert checked_sizes([512, 256, 512]) == (256, 512)
    for wrong in (128, 300, 0):
        with pytest.raises(SearchError, match=rf"expected a multiple of 128 from 256 on, got {wrong}"):
            checked_sizes([wrong])
