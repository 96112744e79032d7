"""The benchmarks measure the project's parts and the whole of it; `python -m benchmarks` lists the commands.

Tests may import this package, and it imports nothing of the tests.
"""
