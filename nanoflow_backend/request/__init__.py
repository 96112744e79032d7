"""What a client asks for: the request, its sampling parameters and structured outputs, and what is wrong with them."""
