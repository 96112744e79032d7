"""An engine for TritonPythonModel that answers nothing by itself, and what its tests send and say."""

import numpy as np

from nanoflow_backend.process.messages import Load, News, Ready
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull

READY = Ready(
    vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, max_running=8, description="fake", queue_room=9
)


LOAD = Load(running=0, waiting=0, used_pages=0, room=9, received=0)


class FakeEngine:
    """Answers nothing by itself; the test speaks for it. While it is `stuck`, not even what is cancelled."""

    latest = None

    def __init__(self, config, callbacks, host_pid):
        self.config, self.on_refusal = config, callbacks.on_refusal
        self.on_death, self.on_restart = callbacks.on_death, callbacks.on_restart
        self.say = lambda *deltas: callbacks.on_news(News(list(deltas), LOAD))
        self.begin = lambda *ids: callbacks.on_news(News([], LOAD, list(ids)))
        self.requests, self.cancelled, self.stopped, self.broken = [], [], False, None
        self.stuck, self.cancels = False, []
        self.full, self.is_ready = None, True
        self.room, self.submissions = 10**6, []
        FakeEngine.latest = self

    def start(self):
        return READY

    def check_room(self, sequences=1):
        if self.full:
            raise self.full
        if sequences > self.room:
            raise QueueFull(0, self.room, sequences)

    def submit(self, *requests):
        if self.broken:
            raise self.broken
        self.submissions.append(len(requests))
        self.requests += requests

    def cancel(self, request_id, reason, index=None):
        self.cancelled.append(request_id)
        self.cancels.append((request_id, reason))
        if self.stuck:
            return
        self.say(Delta(request_id, (), finish_reason=FinishReason.CANCELLED))

    def stop(self):
        self.stopped = True


FLAG = np.array([True])


def text(value):
    return np.array([value.encode()], np.object_)


def last(request_id, token=5):
    return Delta(request_id, (token,), finish_reason=FinishReason.LENGTH)
