"""The engine process: take messages, step, send news. Started by EngineProcess as `python -m`."""

from __future__ import annotations

import gc
import logging
import os
import traceback

import msgspec

from nanoflow_backend.engine.child import Parent
from nanoflow_backend.engine.engine import Engine
from nanoflow_backend.engine.messages import Cancel, Failed, News, Ready, Refusal, Start, Stop, Submit, ToEngine
from nanoflow_backend.scheduler.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.waiting_queue import QueueFull


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parent = Parent()
    decoder = msgspec.msgpack.Decoder(ToEngine)
    try:
        start: Start = parent.receive(decoder)
        engine = Engine(start.config, on_rank_death=lambda how: fail(parent, how))
        gc.collect()
        gc.freeze()  # what lives from here on is small: a full collection took 12 ms every hundred steps before
        parent.send(ready(engine))
        run(engine, parent, decoder)
    except Exception as error:
        logging.getLogger(__name__).error("%s", traceback.format_exc())
        fail(parent, f"{type(error).__name__}: {error}")
    os._exit(0)  # all is closed: taking torch and the interpreter apart is 0.3 s of work, on a loaded host 1.7 s


def fail(parent: Parent, why: str) -> None:
    """From any thread: the main one may wait for a dead rank in a collective."""
    parent.send(Failed(why))
    os._exit(1)


def ready(engine: Engine) -> Ready:
    return Ready(
        vocab_size=engine.model_config.vocab_size,
        max_model_tokens=engine.max_model_tokens,
        num_pages=engine.worker.num_pages,
        page_tokens=engine.config.page_tokens,
        description=engine.description,
        stats=engine.scheduler.stats,
    )


def run(engine: Engine, parent: Parent, decoder: msgspec.msgpack.Decoder[ToEngine]) -> None:
    """Until told to stop: all messages that have come, then one step; wait for a message when there is no work."""
    stopping = False
    while not stopping or engine.has_work:
        while parent.has_message() or not engine.has_work:
            message = parent.receive(decoder)
            if isinstance(message, Stop):
                stopping = True
                engine.cancel_all()
                break
            handle(message, engine, parent)
        deltas = engine.step()
        if deltas or not engine.has_work:  # pages come free after the last delta
            parent.send(News(deltas, engine.scheduler.stats))
    engine.close()


def handle(message: ToEngine, engine: Engine, parent: Parent) -> None:
    match message:
        case Submit(request):
            try:
                engine.add(request)
            except (InvalidRequest, QueueFull) as error:
                parent.send(Refusal(request.id, str(error), overloaded=isinstance(error, QueueFull)))
        case Cancel(request_id):
            engine.cancel(request_id)


if __name__ == "__main__":
    main()
