"""Parts of op graphs that families share: the decoder layer, its rotation, experts."""
