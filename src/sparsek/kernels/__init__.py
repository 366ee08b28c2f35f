"""Kernels: each does the same computation, `reference` defines it and `dispatch` chooses."""
