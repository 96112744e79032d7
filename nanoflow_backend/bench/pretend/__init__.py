"""The real scheduler on a device, a link and host memory that only take time: what runs without either."""
