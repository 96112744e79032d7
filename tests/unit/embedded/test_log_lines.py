"""What is found in a server's log; the lines here are as server 2.51 writes them, and plain ones."""

from nanoflow_backend.embedded import log_lines

START = """\
W1201 04:26:37.019820 18588 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory"
I1201 04:26:37.100000 18588 server.cc:604] "models"
+-------+
| Model |
2026-12-01T04:26:39.594Z WARNING model=nano instance=nano_0_0 nanoflow_backend.engine.energy: requests have no energy
W1201 04:26:40.875222 18588 model.py:84] "model=nano instance=nano_0_0 nanoflow_backend.serving.model: no tokenizer"
2026-12-01T04:26:39.594Z INFO model=nano instance=nano_0_0 nanoflow_backend.engine.worker: WARNING model=no
{"time":"2026-12-01T04:36:40.366Z","level":"WARNING","model":"nano","instance":"nano_0_0","message":"m"}
{"time":"2026-12-01T04:36:40.366Z","level":"INFO","model":"nano","instance":"nano_0_0","message":"m"}
"""
ESCAPED = r"""E1201 04:26:40.875222 1 backend_model.cc:692] "ERROR: Failed to create instance: ConfigError: e.json: no x\n\nAt:\n"
E1201 04:26:40.875363 1 model_lifecycle.cc:642] "failed to load 'nano' version 1: Internal: ConfigError: e.json: no x\n\nAt:\n  /a/config.py(331): _convert\n"
error: creating server: Internal - failed to load all models
"""  # noqa: E501
PLAIN = """\
E1201 04:26:40.875363 1 model_lifecycle.cc:642] failed to load 'b' version 1: Internal: EngineError: ConfigError: no y

At:
  /a/config.py(331): _convert
"""


def test_why_a_model_could_not_load_is_one_line():
    assert log_lines.failures(START) == []
    assert log_lines.failures(START + ESCAPED + PLAIN + ESCAPED) == ["model nano: e.json: no x", "model b: no y"]


def test_an_error_that_is_not_ours_has_its_lines():
    other = ESCAPED.replace("ConfigError", "KeyError")
    assert log_lines.failures(other) == []
    assert log_lines.tail(START + other)[-1] == "error: creating server: Internal - failed to load all models"
    assert "  /a/config.py(331): _convert" in "\n".join(log_lines.tail(other)).splitlines()


def test_warnings_are_those_of_our_models():
    found = log_lines.warnings(START + ESCAPED)
    assert [line.split()[0][:10] for line in found] == ["2026-12-01", "W1201", '{"time":"2']
