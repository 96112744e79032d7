"""This package holds paged causal attention: `paged.attention`, its plan, and its kernels for decodes and prompts."""
