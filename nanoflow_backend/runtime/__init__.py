"""This package runs schedules: a Program is a schedule compiled for a device, on buffers and streams of its own."""
