"""LLM: prompts and parameters that do not fit together, prompts that are refused, streams that are given up."""

import json
import shutil

import pytest

from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import FinishReason

GREEDY = SamplingParams(max_tokens=32, temperature=0.0)


def test_a_bad_prompt_is_named_and_leaves_the_engine_usable(model, prompts):
    llm = LLM.from_pretrained(model)
    with pytest.raises(InvalidRequest, match=r"prompt 1: prompt: expected token ids in 0\.\."):
        llm.generate([prompts[0], [10**6], prompts[1]], GREEDY)
    assert not llm.engine.has_work
    assert llm.generate(prompts[:1], GREEDY)[0].finish_reason is FinishReason.LENGTH


def test_a_stream_that_is_given_up_leaves_the_engine_usable(model, prompts):
    llm = LLM.from_pretrained(model)
    expected = [completion.token_ids for completion in llm.generate(prompts[:2], GREEDY)]
    stream = llm.stream([(prompt, GREEDY) for prompt in prompts])
    next(stream)
    with pytest.raises(RuntimeError, match="runs other requests"):
        llm.generate(prompts[:2], GREEDY)
    stream.close()
    assert not llm.engine.has_work
    with pytest.raises(ZeroDivisionError):
        list(llm.stream((prompts[1 // left], GREEDY) for left in (2, 2, 0)))
    assert [completion.token_ids for completion in llm.generate(prompts[:2], GREEDY)] == expected
    assert llm.engine.scheduler.stats.used_pages == 0


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("The fox", GREEDY, "prompts: expected a list of texts"),
        ([1, 2], GREEDY, "prompts: expected a list of texts"),
        (["a", "b"], [GREEDY], "params: expected one, or one for each of 2 prompts; got 1"),
        (["a"], [], "params: expected one, or one for each of 1 prompts; got 0"),
    ],
)
def test_prompts_and_params_that_do_not_match_are_refused(model, prompts, params, message):
    llm = LLM.from_pretrained(model)
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(prompts, params)


def test_a_model_of_endless_positions_is_held_to_what_the_kv_cache_holds(model, prompts, tmp_path):
    """2^31 - 1 positions in 512 slots: an entry for each of their pages would be 256 GiB."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**31 - 1}))
    long = SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True)
    (bounded, endless) = (
        LLM.from_pretrained(folder, kv_cache_tokens=128).generate(prompts[:4], long) for folder in (model, tmp_path)
    )
    assert [c.token_ids for c in endless] == [c.token_ids for c in bounded]
    assert {c.num_input_tokens + len(c.token_ids) for c in endless} == {128 + 1}
