"""An engine for TritonPythonModel that answers nothing by itself, and what its tests send and say."""

import numpy as np

from nanoflow_backend.process.messages import News, Queue, Ready
from nanoflow_backend.scheduler.batch import Delta, FinishReason

READY = Ready(vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, description="fake", queue_room=9)


class FakeEngine:
    """Answers nothing by itself; the test speaks for it."""

    latest = None

    def __init__(self, config, callbacks, host_pid):
        self.config, self.on_refusal = config, callbacks.on_refusal
        self.on_death, self.on_restart = callbacks.on_death, callbacks.on_restart
        self.say = lambda *deltas: callbacks.on_news(News(list(deltas), Queue(0, 9, 0)))
        self.requests, self.cancelled, self.stopped, self.broken = [], [], False, None
        self.full, self.is_ready = None, True
        FakeEngine.latest = self

    def start(self):
        return READY

    def check_room(self):
        if self.full:
            raise self.full

    def submit(self, request):
        if self.broken:
            raise self.broken
        self.requests.append(request)

    def cancel(self, request_id, reason, index=None):
        self.cancelled.append(request_id)
        self.say(Delta(request_id, (), finish_reason=FinishReason.CANCELLED))

    def stop(self):
        self.stopped = True


FLAG = np.array([True])


def text(value):
    return np.array([value.encode()], np.object_)


def last(request_id, token=5):
    return Delta(request_id, (token,), finish_reason=FinishReason.LENGTH)
