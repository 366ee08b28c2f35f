"""The edges: each module puts Sparse-K into one engine. Nothing inside the package imports them."""
