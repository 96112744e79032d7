"""`nanoflow bench online`: latency, of a fixed number of requests in flight (closed loop) or at a rate (open loop)."""
