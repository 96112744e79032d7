"""KV pages: who owns them (ints) and the tensors that hold them."""
