"""This package shows the engine to its operators: families of metrics, the server's page of them, and traces."""
