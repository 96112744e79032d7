"""Planning: a layer as a problem, the two mixed-integer programs that solve it, and the candidates they give."""
