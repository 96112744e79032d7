"""What an operator sees: the families of metrics, the page of metrics, and traces."""
