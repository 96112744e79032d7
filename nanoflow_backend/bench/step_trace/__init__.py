"""`nanoflow trace`: a few steps of an engine, launch by launch, as a picture for Perfetto or chrome://tracing."""
