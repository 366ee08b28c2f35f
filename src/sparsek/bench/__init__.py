"""Benchmarks: libraries behind `sparsek bench` and `sparsek bench-attention`."""
