"""The leader's side of a run: an engine under a Supervisor, told by lines of JSON what to do, and telling what happens.

`python -m benchmarks.hosts.leader engine.json` reads {"prompts", "max_tokens"} a line from standard input, and writes
an event a line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process import logs
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.process.messages import News
from nanoflow_backend.process.supervisor import Supervisor
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams

TOKENS = 24


def main() -> None:
    logs.configure()
    tokens: dict[int, list[int]] = defaultdict(list)
    live: set[int] = set()
    loaded_tokens = first = 0
    saying = threading.Lock()

    def say(event: str, **fields: Any) -> None:
        with saying:
            print(json.dumps({"event": event, **fields}), flush=True)

    def take(news: News) -> None:
        nonlocal loaded_tokens
        for delta in news.deltas:
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                live.discard(delta.request_id)
            if delta.account:
                loaded_tokens += delta.account.host_tokens
        if news.deltas and not live:
            answers = [tokens.pop(request_id) for request_id in sorted(tokens)]
            say("tokens", tokens=answers, loaded_tokens=loaded_tokens)

    def quiet(_: object) -> None: ...

    def die(how: str) -> None:
        live.clear()
        tokens.clear()
        say("death", how=how)

    engine = Supervisor(
        EngineConfig.load(Path(sys.argv[1])),
        Callbacks(take, quiet, quiet, quiet, on_death=die, on_restart=lambda ready: say("again")),
    )
    try:
        engine.start()
    except EngineError as error:
        say("failed", how=str(error))
        return
    say("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = asked["prompts"]
        params = SamplingParams(max_tokens=asked["max_tokens"], temperature=0.0, ignore_eos=True)
        requests = [Request(first + number, prompt, params) for number, prompt in enumerate(prompts)]
        first += len(requests)
        while not engine.is_ready:  # a moment after "again"
            time.sleep(0.01)
        live.update(request.id for request in requests)
        try:
            engine.submit(*requests)
        except EngineError as error:
            live.clear()
            say("refused", how=str(error))
    engine.stop()


if __name__ == "__main__":
    main()
