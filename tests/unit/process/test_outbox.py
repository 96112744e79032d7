"""The outbox: in order, and nobody waits for a child that does not read."""

import threading

import pytest
from support.waiting import until

from nanoflow_backend.process.child import ChildDied, encode
from nanoflow_backend.process.messages import Cancel
from nanoflow_backend.process.outbox import Outbox, OutboxFull

MESSAGE_BYTES = len(encode(Cancel(0)))


class Child:
    """Reads while it may."""

    def __init__(self):
        self.read, self.reads, self.gone = [], threading.Event(), False

    def send_bytes(self, message):
        assert self.reads.wait(30)
        if self.gone:
            raise ChildDied("process 7 ended with SIGKILL")
        self.read.append(message)


@pytest.fixture
def child():
    child = Child()
    yield child
    child.reads.set()


def test_a_child_that_does_not_read_makes_nobody_wait(child):
    outbox = Outbox(child, most_bytes=3 * MESSAGE_BYTES)
    for number in range(3):
        outbox.put(Cancel(number))
    with pytest.raises(OutboxFull, match="the engine has not read 0 MiB of requests yet: try again later"):
        outbox.put(Cancel(3))
    outbox.put(Cancel(4), always=True)
    assert child.read == []
    child.reads.set()
    until(lambda: len(child.read) == 4)
    assert child.read == [encode(Cancel(number)) for number in (0, 1, 2, 4)]
    outbox.put(Cancel(5))  # there is room again
    until(lambda: len(child.read) == 5)
    outbox.close("done")
    outbox.join()


def test_one_message_may_be_larger_than_all_that_may_wait(child):
    outbox = Outbox(child, most_bytes=1)
    outbox.put(Cancel(0))
    child.reads.set()
    until(lambda: len(child.read) == 1)
    outbox.close("done")


def test_whoever_comes_after_the_end_hears_of_it(child):
    outbox = Outbox(child)
    outbox.put(Cancel(0))
    outbox.put(Cancel(1))
    outbox.close("process 7 was killed: it made no step")
    outbox.close("another reason")
    with pytest.raises(ChildDied, match="it made no step"):
        outbox.put(Cancel(2), always=True)
    child.reads.set()
    outbox.join()
    assert child.read in ([], [encode(Cancel(0))])  # what was being sent, and nothing after it


def test_a_child_that_dies_while_it_is_sent_something_is_known_at_once(child):
    outbox = Outbox(child)
    outbox.put(Cancel(0))
    child.gone = True
    child.reads.set()
    outbox.join()
    with pytest.raises(ChildDied, match="ended with SIGKILL"):
        outbox.put(Cancel(1))
