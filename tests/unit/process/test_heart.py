"""What an engine process says of itself while its loop is busy."""

import threading
import time

from support.waiting import until

from nanoflow_backend.process.heart import Heart
from nanoflow_backend.process.messages import LOAD_PERIOD_S, Heartbeat, Load


class Sent:
    def __init__(self):
        self.messages, self.lock = [], threading.Lock()

    def __call__(self, message):
        with self.lock:
            self.messages.append((time.monotonic(), message))

    def loads(self):
        with self.lock:
            return [message for _, message in self.messages if isinstance(message, Load)]


def test_a_load_is_sent_when_it_has_changed_and_never_again():
    sent = Sent()
    heart = Heart(sent)
    heart.carry((0, 0, 0))
    until(lambda: any(isinstance(message, Heartbeat) for _, message in sent.messages))
    assert sent.loads() == []
    heart.carry((2, 1, 7))
    until(lambda: sent.loads() == [Load(running=2, waiting=1, used_pages=7)])
    for _ in range(3):
        heart.carry((2, 1, 7))
    time.sleep(3 * LOAD_PERIOD_S)
    assert len(sent.loads()) == 1


def test_of_many_changes_few_are_sent_and_the_last_one_is():
    sent = Sent()
    heart = Heart(sent)
    begun_s = time.monotonic()
    for pages in range(1, 3001):
        heart.carry((1, 0, pages))
        time.sleep(0.0001)
    until(lambda: sent.loads()[-1].used_pages == 3000)
    took_s = time.monotonic() - begun_s
    assert 2 <= len(sent.loads()) <= took_s / LOAD_PERIOD_S + 2
    pages = [load.used_pages for load in sent.loads()]
    assert pages == sorted(set(pages))
