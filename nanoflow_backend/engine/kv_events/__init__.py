"""This package tells gateways which KV pages the engine has: as the messages that they read from vLLM, over ZeroMQ."""
