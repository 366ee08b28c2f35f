"""Sparse-K attention: each query keeps its K strongest keys."""

from . import _loading as _loading  # before anything that takes time

# isort: split
from importlib.metadata import version as _version

from .attention import attention, select, topk_mask
from .config import SparseKConfig
from .key_index import KeyIndex
from .policy import recommend_k
from .selection import Selection
from .varlen import attention_varlen

__version__ = _version("sparsek")
__all__ = [
    "KeyIndex",
    "Selection",
    "SparseKConfig",
    "attention",
    "attention_varlen",
    "recommend_k",
    "select",
    "topk_mask",
]
