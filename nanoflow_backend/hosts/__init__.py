"""This package joins the ranks of one engine: those of this host over socket pairs, those of others over TCP.

There is no torch in it: the ranks themselves are `engine/ranks.py`.
"""
