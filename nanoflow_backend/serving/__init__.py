"""The Triton Inference Server side: the Python backend model, its tensors, and the server that pip brings."""
