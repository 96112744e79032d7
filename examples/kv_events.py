"""The KV pages of an engine, as a gateway follows them: python examples/kv_events.py --endpoint tcp://localhost:5557

engine.json has "kv_events": {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}. Needs pyzmq and msgspec.
"""

import argparse

import msgspec
import zmq

parser = argparse.ArgumentParser()
parser.add_argument("--endpoint", default="tcp://localhost:5557")
parser.add_argument("--replay-endpoint", default="tcp://localhost:5558")
parser.add_argument("--quiet-s", type=float, default=60, help="end after so long without a message")
options = parser.parse_args()
context, blocks = zmq.Context(), {}  # by medium and hash: the hash of the block before, token ids


def apply(number, payload):
    _, events, rank = msgspec.msgpack.decode(payload)
    for name, *fields in events:
        if name == "BlockStored":
            hashes, parent, ids, size, _, medium, _ = fields
            for index, block in enumerate(hashes):
                blocks[medium, block] = parent, ids[index * size : (index + 1) * size]
                parent = block
        elif name == "BlockRemoved":
            for block in fields[0]:
                blocks.pop((fields[1], block), None)
        elif name == "AllBlocksCleared":
            blocks.clear()
    print(f"engine {rank}, batch {number}: {' '.join(name for name, *_ in events)}; {len(blocks)} blocks", flush=True)
    return number + 1  # of the next batch


def replay(expected):
    """Apply all batches that the engine keeps from a number on. Returns the number of the next."""
    with context.socket(zmq.DEALER) as dealer:  # a REQ socket would take one reply only
        dealer.connect(options.replay_endpoint)
        dealer.send_multipart([b"", expected.to_bytes(8, "big")])
        while dealer.poll(5000):
            _, _, number, payload = dealer.recv_multipart()
            if not payload:
                break
            if (number := int.from_bytes(number, "big")) > expected:
                blocks.clear()  # some are not kept any more: what is known may be wrong
            expected = apply(number, payload)
    return expected


with context.socket(zmq.SUB) as live:
    live.subscribe("")
    live.connect(options.endpoint)
    expected, last = replay(0), -1
    while live.poll(1000 * options.quiet_s):
        _, number, payload = live.recv_multipart()
        before, last = last, int.from_bytes(number, "big")
        expected = 0 if last <= before else expected  # the engine has started again
        if last >= expected:
            expected = apply(last, payload) if last == expected else replay(expected)
