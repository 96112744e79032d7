"""Exit 0 where the server and each of its models is ready, else say which is not. Standard library only.

    python3 healthcheck.py [http://localhost:8000]

The server's own readiness is not enough: it can stay ready beside a model whose engine is gone.
"""

import json
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 6  # a server that asks its models (26.04 and later) gives them 5 s


def check(url: str) -> None:
    """Raises: OSError (of which URLError is one), ValueError; the message says what is not ready."""
    models = json.loads(fetch(f"{url}/v2/repository/index", b"{}"))
    if not models:
        raise ValueError("the server has no model")
    for model in models:
        if model.get("state") != "READY":
            raise ValueError(f"model {model['name']}: {model.get('state', 'not loaded')} {model.get('reason', '')}")
        fetch(f"{url}/v2/models/{model['name']}/versions/{model['version']}/ready")
    fetch(f"{url}/v2/health/ready")


def fetch(url: str, body: bytes | None = None) -> bytes:
    try:
        with urllib.request.urlopen(url, body, TIMEOUT_S) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: {error.code}") from None


if __name__ == "__main__":
    try:
        check(*sys.argv[1:] or ["http://localhost:8000"])
    except (OSError, ValueError) as reason:
        sys.exit(f"not ready: {reason}")
