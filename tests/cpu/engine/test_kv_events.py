"""An engine that publishes KV events: a subscriber knows its pages; endpoints are had before the model is loaded."""

import pytest
import zmq
from support.engine.page_map import PageMap
from support.engine.subscriber import Subscriber
from support.waiting import until

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.request.request import Request

PAGE_TOKENS = 4


@pytest.fixture
def endpoints(tmp_path):
    return {"endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay"}


def run(engine, prompts, first_id=0):
    """All to their end. Returns the tokens of each request, the prompt's and its own."""
    tokens = {first_id + number: list(prompt) for number, prompt in enumerate(prompts)}
    for request_id, prompt in tokens.items():
        engine.add(Request(request_id, list(prompt), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)))
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    return list(tokens.values())


def followed(known, block):
    """The tokens up to the end of a block, by its parents."""
    parent, own = known.blocks["GPU"][block]
    return (followed(known, parent) if parent is not None else ()) + own


def test_a_subscriber_can_tell_which_prompt_finds_its_pages(model, prompts, endpoints):
    config = {"page_tokens": PAGE_TOKENS, "kv_cache_tokens": 200, "dense_batch_tokens": 32}
    engine = Engine.from_pretrained(model, **config, kv_events=endpoints)
    run(engine, prompts[:8])
    said = run(engine, [prompts[0] * 2, [*prompts[0] * 2, 7], prompts[1]], first_id=8)
    with Subscriber(**endpoints) as gateway:
        cached_pages = engine.scheduler.stats.cached_pages
        known = PageMap()

        def all_is_heard():
            names = [name for _, _, payload in gateway.replay(0) for name in known.take(payload)]
            assert names[0] == "AllBlocksCleared"  # so whatever was known before is forgotten
            assert "BlockRemoved" in names
            return len(known.blocks["GPU"]) == cached_pages

        until(all_is_heard)
    sequences = {followed(known, block) for block in known.blocks["GPU"]}
    for tokens in said:  # the last token was never read, so the page that it fills is none yet
        for end in range(PAGE_TOKENS, len(tokens), PAGE_TOKENS):
            assert tuple(tokens[:end]) in sequences
    engine.close()


def test_a_subscriber_knows_the_pages_of_host_memory_too(model, prompts, endpoints):
    config = {"page_tokens": PAGE_TOKENS, "kv_cache_tokens": 200, "dense_batch_tokens": 32}
    engine = Engine.from_pretrained(model, **config, host_kv_cache_bytes=2**24, kv_events=endpoints)
    for first_id in (0, 100):
        run(engine, prompts[:8], first_id)
    stats = engine.scheduler.stats
    assert stats.tiers.moved_pages["load"] > 0
    with Subscriber(**endpoints) as gateway:
        known = PageMap()

        def all_is_heard():
            for _, _, payload in gateway.replay(0):
                known.take(payload)
            there = {medium: len(blocks) for medium, blocks in known.blocks.items()}
            return there == {"GPU": stats.cached_pages, "CPU": stats.tiers.host_used_pages}

        until(all_is_heard)
    on_both = known.blocks["GPU"].keys() & known.blocks["CPU"].keys()
    assert on_both
    assert all(known.blocks["GPU"][block] == known.blocks["CPU"][block] for block in on_both)
    assert known.blocks["CPU"].keys() - on_both, "what has left the device is known to be below it"
    engine.close()


def test_an_endpoint_that_is_taken_is_an_error_before_the_model_is_loaded(model, endpoints):
    def loads(*_):
        raise AssertionError("the model is loaded")

    with zmq.Context() as context, context.socket(zmq.PUB) as other:
        taken = {**endpoints, "replay_endpoint": f"tcp://*:{other.bind_to_random_port('tcp://*')}"}
        config = EngineConfig(model=str(model), kv_events=KvEventsConfig(**taken))
        with pytest.raises(
            ConfigError, match=r"kv_events.replay_endpoint: cannot bind tcp://.*: Address already in use"
        ):
            Engine(config, make_executor=loads)
    Engine(config).close()
    Engine(config).close()


def test_an_engine_that_does_not_start_leaves_no_endpoint_taken(model, endpoints):
    def fails(*_):
        raise ConfigError("no memory")

    with zmq.Context() as context, context.socket(zmq.PUB) as other:
        port = other.bind_to_random_port("tcp://*")
    config = EngineConfig(model=str(model), kv_events=KvEventsConfig(endpoint=f"tcp://*:{port}"))
    for _ in range(2):
        with pytest.raises(ConfigError, match="no memory"):
            Engine(config, make_executor=fails)
