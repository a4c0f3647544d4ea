"""The tracer: turns a PyTorch loop into phases, from outside, and measures each step."""
