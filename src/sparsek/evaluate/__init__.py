"""Evaluation: what K costs in quality, measured on a model and a text."""
