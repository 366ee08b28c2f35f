"""Sparse-K in vLLM, on the CPU or on a GPU as this vLLM is: `make test-vllm`, `make test-vllm-gpu`."""

import os

# One process, so that tests can look into it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest

pytest.importorskip("vllm")
