"""Engine: what scheduling must not change, overshoot, stops, an interrupted step, and bad configurations."""

import pytest

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, Engine, SamplingParams
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import FinishReason

GREEDY = SamplingParams(max_tokens=32, temperature=0.0)


def test_async_scheduling_changes_no_token(model, prompts):
    params = [
        SamplingParams(max_tokens=20 + number, temperature=number % 3 / 2, seed=number, top_k=number % 5 * 10)
        for number in range(len(prompts))
    ]
    options = {"dense_batch_tokens": 48, "chunk_tokens": 16, "page_tokens": 8}
    arms = [
        LLM.from_pretrained(model, async_scheduling=on, **options).generate(prompts, params) for on in (True, False)
    ]
    assert [c.token_ids for c in arms[0]] == [c.token_ids for c in arms[1]]


def test_scarce_pages_change_no_token(model, prompts):
    """Preempted requests compute again and draw the same tokens."""
    params = [SamplingParams(max_tokens=48, temperature=1.0, seed=number) for number in range(len(prompts))]
    ample = LLM.from_pretrained(model).generate(prompts, params)
    scarce = LLM.from_pretrained(model, kv_cache_tokens=192, page_tokens=4, dense_batch_tokens=32)
    scarce.generate(prompts * 2, SamplingParams(max_tokens=2))  # it learns to expect short outputs, and admits too many
    assert [c.token_ids for c in scarce.generate(prompts, params)] == [c.token_ids for c in ample]
    assert scarce.engine.scheduler.stats.preemptions > 0
    scarce.engine.scheduler.check()
    assert scarce.engine.scheduler.stats.used_pages == 0


def test_tokens_without_a_seed_repeat_with_the_engine_seed(model, prompts):
    hot = SamplingParams(max_tokens=16, temperature=1.0)
    runs = [[c.token_ids for c in LLM.from_pretrained(model, seed=s).generate(prompts, hot)] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_token_ids_stop_and_overshoot_is_one_token_at_most(model, prompts):
    llm = LLM.from_pretrained(model)
    plain = llm.generate(prompts, GREEDY)
    stops = [completion.token_ids[11] for completion in plain]
    before = llm.engine.scheduler.stats.overshoot_tokens
    params = [SamplingParams(max_tokens=32, temperature=0.0, stop_token_ids=(stop,)) for stop in stops]
    for stopped, whole, stop in zip(llm.generate(prompts, params), plain, stops, strict=True):
        assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
        assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert 0 < llm.engine.scheduler.stats.overshoot_tokens - before <= len(prompts)


def test_stop_strings_end_the_text_and_free_the_pages(model):
    llm = LLM.from_pretrained(model)
    prompt = "The quick brown fox"
    (whole,) = llm.generate([prompt], GREEDY)
    stop = whole.text[8:11]
    params = SamplingParams(max_tokens=32, temperature=0.0, stop=(stop,))
    (stopped,) = llm.generate([prompt], params)
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert llm.engine.scheduler.stats.used_pages == 0


def test_an_interrupted_step_is_an_error_and_no_endless_loop(model, prompts, monkeypatch):
    engine = Engine.from_pretrained(model)
    monkeypatch.setattr(engine.executor, "launch_forward", lambda batch: 1 // 0)
    engine.add(Request(0, prompts[0], GREEDY))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.cancel_all()
    assert [delta.finish_reason for delta in engine.step()] == [FinishReason.CANCELLED]
    with pytest.raises(RuntimeError, match="there is work, and nothing can run"):
        engine.step()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_model_tokens": 10**6}, "max_model_tokens: expected at most 512"),
        ({"schedule": "fastest"}, "schedule fastest: expected sequential, nano-batched-N"),
        ({"schedule": "nano-batched-600"}, "schedule nano-batched-600: parts: expected 1..102"),
        ({"page_size": 16}, "unknown field `page_size`"),
        (
            {"kv_cache_tokens": 2 * 10**9},
            r"kv_cache_tokens: 20+ tokens take \d.* of memory are free on cpu: expected at most",
        ),
    ],
)
def test_a_bad_configuration_is_refused_by_name(model, fields, message):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(model, **fields)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder"):
        Engine.from_pretrained(tmp_path / "nowhere")
