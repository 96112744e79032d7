"""Imports flow one way, as the contracts in pyproject.toml say."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_contract_is_kept(monkeypatch):
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # the linter's switches our loggers off
    assert lint_imports(config_filename=str(PYPROJECT), no_cache=True) == EXIT_STATUS_SUCCESS
