"""A reply with a client that checks what it is sent, and the deltas of a request."""

import threading
import time

import numpy as np

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.serving.call import Call
from nanoflow_backend.serving.reply import Reply
from nanoflow_backend.serving.tensors import OUTPUTS

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. 😀"


DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}


DECLARED = {t.name: t for t in OUTPUTS}


ACCOUNT = Account(100.0, 100.5, 102.0, 104.0, peak_pages=7, energy_j=12.5, host_tokens=16, disk_tokens=32)


class Client:
    """A channel that keeps what it was sent, checks it against the table, and may be slow, broken or gone."""

    def __init__(self, delay_s=0.0, broken_after=None):
        self.delay_s, self.broken_after = delay_s, broken_after
        self.whole, self.responses, self.finals, self.failure, self.threads = [], [], 0, None, set()

    def send(self, tensors, final, parameters):
        assert not self.finals, "a response after the final one"
        if self.broken_after is not None and len(self.responses) >= self.broken_after:
            raise RuntimeError("shared memory is full")
        self.threads.add(threading.get_ident())
        time.sleep(self.delay_s)
        assert bool(parameters) <= final
        self.parameters = parameters
        for name, value in tensors.items():
            declared = DECLARED[name]
            assert value.dtype == DTYPES[declared.type]
            assert value.ndim == len(declared.dims)
            assert declared.dims[0] in (-1, value.size)
        self.whole.append(tensors)
        self.responses.append({n: v[0].decode() if v.dtype == np.object_ else v.tolist() for n, v in tensors.items()})
        self.finals += final

    def fail(self, failure):
        assert not self.finals, "a response after the final one"
        self.failure = failure
        self.finals += 1

    def is_cancelled(self):
        return False

    def sent(self, name):
        return [response[name] for response in self.responses]


class Conversation:
    """A reply with what it talks to."""

    def __init__(
        self, tokenizer, *, stream=True, shown_prompt="", outputs=("text_output",), client=None, trace=None, **params
    ):
        self.client = client or Client()
        self.reasons = []
        self.call = Call(
            prompt=[1, 2, 3],
            params=SamplingParams(max_tokens=1000, **params),
            stream=stream,
            shown_prompt=shown_prompt,
            outputs=frozenset(outputs),
            show_logprobs=params.get("logprobs") is not None,
            timeout_us=1500,
        )
        self.reply = Reply(self.call, self.client, tokenizer, self._cancel, trace)

    def _cancel(self, reason, index):
        self.reasons.append(reason)
        self.cancelled = index

    @property
    def cancels(self):
        return len(self.reasons)


def deltas(ids, request_id=0, reason=FinishReason.LENGTH, **last):
    """One delta per token, the last with a finish reason and what else is given."""
    *before, end = ids
    return [*(Delta(request_id, (token,)) for token in before), Delta(request_id, (end,), finish_reason=reason, **last)]
