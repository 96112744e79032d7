"""The engine: scheduler, worker and text joined into one loop, in this process or another."""
