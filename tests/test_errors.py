"""Every public error, provoked: its message quotes what was given and says what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sparsek import SparseKConfig, attention, recommend_k, select, topk_mask
from sparsek.config import parse_layers, parse_top_k

INT32 = "must be an integer from 0 to 2147483647"
BUDGET = 'must be an integer >= 0, "auto", or one of these per layer'
DTYPES = "must be float16, bfloat16 (torch only), float32 or float64"
FIELDS = "top_k, sinks, window, stride, tail, dense_layers, min_context, check_finite"

Row = tuple[Callable[[], Any], type[Exception], str, str]  # what fails, how, what was given, what is allowed


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def call(**changes: Any) -> Callable[[], Any]:
    """attention() on good inputs, but for the changes."""
    good = {"q": zeros(1, 4, 3, 8), "k": zeros(1, 2, 5, 8), "v": zeros(1, 2, 5, 6)}
    return partial(attention, **{**good, "config": SparseKConfig.pure(2), **changes})


def not_finite(name: str, value: float) -> Callable[[], Any]:
    inputs = {"q": zeros(1, 4, 3, 8), "k": zeros(1, 2, 5, 8), "v": zeros(1, 2, 5, 6)}
    inputs[name][0, 1, 2, 3] = value
    return call(**inputs, config=SparseKConfig(check_finite=True))


config = partial(partial, SparseKConfig)
gguf = partial(partial, SparseKConfig.from_gguf_metadata)
finite = SparseKConfig(check_finite=True)

CONFIG: list[Row] = [
    (config(top_k=-1), ValueError, "top_k = -1", INT32),
    (config(top_k=2**31), ValueError, "top_k = 2147483648", INT32),
    (config(top_k=64.0), TypeError, "top_k = 64.0", "must be an integer >= 0"),
    (config(top_k=True), TypeError, "top_k = True", "must be an integer >= 0"),
    (config(top_k=None), TypeError, "top_k = None", "must be an integer >= 0"),
    (config(top_k="64"), ValueError, "top_k = '64'", BUDGET),
    (config(top_k=()), ValueError, "top_k = ()", BUDGET),
    (config(top_k=(4, -1)), ValueError, "top_k = -1", INT32),
    (config(top_k=((1, 2), 3)), TypeError, "top_k = (1, 2)", "must be an integer >= 0"),
    (config(sinks=-1), ValueError, "sinks = -1", INT32),
    (config(window=1.5), TypeError, "window = 1.5", "must be an integer >= 0"),
    (config(stride=2**40), ValueError, "stride = 1099511627776", INT32),
    (config(min_context="1024"), TypeError, "min_context = '1024'", "must be an integer >= 0"),
    (config(tail="mean"), ValueError, "tail = 'mean'", "must be one of 'none', 'centroid'"),
    (config(dense_layers=0), TypeError, "dense_layers = 0", "must be a tuple of layer numbers, like (0, 1)"),
    (config(dense_layers="0"), TypeError, "dense_layers = '0'", "must be a tuple of layer numbers"),
    (config(dense_layers=(-1,)), ValueError, "dense_layers = -1", INT32),
    (config(dense_layers=(0.5,)), TypeError, "dense_layers = 0.5", "must be an integer >= 0"),
    (config(check_finite=1), TypeError, "check_finite = 1", "must be True or False"),
    (partial(SparseKConfig.pure, 0), ValueError, "top_k = 0 with sinks", "top_k must be at least 1, or one"),
    (partial(SparseKConfig.pure, (4, 0)), ValueError, "top_k = (4, 0) with sinks", "must be at least 1"),
    (partial(SparseKConfig.from_dict, {"topk": 1}), ValueError, "'topk'", f"known are {FIELDS}"),
    (partial(SparseKConfig.from_dict, [1]), TypeError, "got [1]", "must be an object of fields"),
    (partial(SparseKConfig.from_json, "{top_k: 1}"), ValueError, "{top_k: 1}", "not a JSON configuration"),
    (partial(SparseKConfig.from_json, "[1]"), TypeError, "got [1]", "must be an object of fields"),
    (gguf({"sparsek.k": 1}), ValueError, "'k'", f"known are {FIELDS}"),
    (gguf({"sparsek.top_k": "4,x"}), ValueError, "top_k = 'x'", 'must be an integer >= 0 or "auto"'),
    (gguf({"sparsek.dense_layers": "a"}), ValueError, "dense_layers = 'a'", "must be layer numbers like 0,1"),
    (partial(parse_top_k, ""), ValueError, "top_k = ''", 'must be an integer >= 0 or "auto"'),
    (partial(parse_top_k, "1.5"), ValueError, "top_k = '1.5'", 'must be an integer >= 0 or "auto"'),
    (
        partial(parse_layers, "0;1"),
        ValueError,
        "dense_layers = '0;1'",
        "must be layer numbers like 0,1 or none",
    ),
]

PER_LAYER = SparseKConfig(top_k=(8, 16))
POLICY: list[Row] = [
    (call(config=PER_LAYER), ValueError, "layer = None", "must be one of 0 to 1"),
    (call(config=PER_LAYER, layer=2), ValueError, "(8, 16) gives one value for each of 2 layers", "0 to 1"),
    (call(config=PER_LAYER, layer=-1), ValueError, "layer = -1", "must be one of 0 to 1"),
    (call(config=PER_LAYER, layer="0"), TypeError, "layer = '0'", "must be"),
    (partial(recommend_k, 0), ValueError, "context_length = 0", "must be a positive number of tokens"),
    (partial(recommend_k, float("nan")), ValueError, "context_length = nan", "must be a positive number"),
    (partial(recommend_k, "2048"), TypeError, "context_length = '2048'", "must be a positive number"),
    (
        partial(recommend_k, 2048, -7e9),
        ValueError,
        "num_parameters = -7000000000.0",
        "must be positive, like",
    ),
    (partial(recommend_k, 2048, float("nan")), ValueError, "num_parameters = nan", "must be positive"),
    (partial(recommend_k, 2048, "7B"), TypeError, "num_parameters = '7B'", "must be positive"),
]

half, double = torch.float16, torch.float64
PROBLEM: list[Row] = [
    (call(config={"top_k": 2}), TypeError, "config = {'top_k': 2}", "must be a SparseKConfig"),
    (call(config=None), TypeError, "config = None", "must be a SparseKConfig"),
    (call(q=[[1.0]]), TypeError, "q is a list", "must be a torch tensor or a numpy array"),
    (call(is_causal="yes"), TypeError, "is_causal = 'yes'", "must be True or False"),
    (call(softcap=1e300), ValueError, "softcap = 1e+300", "must be a positive number"),
    (call(index="yes"), TypeError, "index = 'yes'", "must be a sparsek.KeyIndex"),
    (call(q=np.ma.ones((1, 4, 3, 8))), TypeError, "q is a MaskedArray", "must be a torch tensor or a numpy"),
    (
        call(q=np.ones((1, 4, 3, 8), ">f4")),
        TypeError,
        "q has dtype >f4",
        "must be in this machine's byte order",
    ),
    (call(v=None), TypeError, "v is a NoneType", "must be a torch tensor or a numpy array"),
    (call(k=np.zeros((1, 2, 5, 8))), TypeError, "q is a Tensor and k a ndarray", "must be of one kind"),
    (call(q=zeros(1, 4, 3, 8, dtype=torch.int32)), TypeError, "q has dtype torch.int32", DTYPES),
    (call(v=zeros(1, 2, 5, 6, dtype=torch.complex64)), TypeError, "v has dtype torch.complex64", DTYPES),
    (call(q=zeros(1, 4, 3, 8, dtype=torch.float8_e5m2)), TypeError, "q has dtype torch.float8_e5m2", DTYPES),
    (call(q=np.zeros((1, 4, 3, 8), np.longdouble)), TypeError, "q has dtype float128", DTYPES),
    (call(k=zeros(1, 2, 5, 8, dtype=half)), TypeError, "float32 and k torch.float16", "must be the same"),
    (call(v=zeros(1, 2, 5, 6, dtype=double)), TypeError, "float32 and v torch.float64", "must be the same"),
    (call(k=zeros(1, 2, 5, 8).to("meta")), ValueError, "q is on cpu and k on meta", "on the same device"),
    (
        call(q=zeros(4, 3, 8)),
        ValueError,
        "q has shape [4, 3, 8]",
        "4 axes, [batch, heads, tokens, head size]",
    ),
    (call(q=zeros(1, 4, 3, 0), k=zeros(1, 2, 5, 0)), ValueError, "q has shape [1, 4, 3, 0]", "at least 1"),
    (call(q=zeros(2, 4, 3, 8)), ValueError, "q has shape [2, 4, 3, 8] and k [1, 2, 5, 8]", "must be equal"),
    (call(k=zeros(1, 2, 5, 7)), ValueError, "[1, 4, 3, 8] and k [1, 2, 5, 7]", "head size must be equal"),
    (call(q=zeros(1, 3, 3, 8)), ValueError, "q has 3 heads and k 2", "must be a multiple of key/value heads"),
    (call(k=zeros(1, 0, 5, 8)), ValueError, "q has 4 heads and k 0", "must be a multiple of key/value heads"),
    (call(v=zeros(1, 2, 4, 6)), ValueError, "[1, 2, 5, 8] and v [1, 2, 4, 6]", "tokens must be equal"),
    (
        call(v=zeros(1, 1, 5, 6)),
        ValueError,
        "[1, 2, 5, 8] and v [1, 1, 5, 6]",
        "heads and tokens must be equal",
    ),
    (call(attn_mask=[[True]]), TypeError, "attn_mask is a list and q a Tensor", "must be of one kind"),
    (call(attn_mask=np.ones(5, bool)), TypeError, "attn_mask is a ndarray and q a Tensor", "one kind"),
    (call(attn_mask=torch.ones(3, 5).long()), TypeError, "torch.int64", "must be bool (True = allowed) or"),
    (call(attn_mask=zeros(3, 4)), ValueError, "shape [3, 4]", "broadcast to [B, H, Tq, Tk] = [1, 4, 3, 5]"),
    (
        call(attn_mask=zeros(1, 1, 1, 3, 5)),
        ValueError,
        "shape [1, 1, 1, 3, 5]",
        "[B, H, Tq, Tk] = [1, 4, 3, 5]",
    ),
    (call(attn_mask=zeros(3, 5).to("meta")), ValueError, "q is on cpu and attn_mask on meta", "same device"),
    (call(scale=float("inf")), ValueError, "scale = inf", "must be a finite number"),
    (call(scale="1"), TypeError, "scale = '1'", "must be a finite number"),
    (call(softcap=0.0), ValueError, "softcap = 0.0", "must be a positive number, or None"),
    (call(softcap=float("nan")), ValueError, "softcap = nan", "must be a positive number, or None"),
    (call(softcap="1"), TypeError, "softcap = '1'", "must be a positive number, or None"),
    (not_finite("q", float("nan")), ValueError, "q has nan at [0, 1, 2, 3]", "NaN or infinity cannot be"),
    (not_finite("k", float("inf")), ValueError, "k has inf at [0, 1, 2, 3]", "NaN or infinity cannot be"),
    (not_finite("v", -float("inf")), ValueError, "v has -inf at [0, 1, 2, 3]", "NaN or infinity cannot be"),
    (call(config=finite, attn_mask=zeros(3, 5) * np.nan), ValueError, "NaN", "finite, or -infinity where"),
    (
        call(config=finite, attn_mask=zeros(3, 5) + np.inf),
        ValueError,
        "+infinity",
        "finite, or -infinity where",
    ),
]

DISPATCH: list[Row] = [
    (
        call(backend="cuda"),
        ValueError,
        "backend = 'cuda'",
        "must be one of 'auto', 'cpu', 'triton_decode', 'triton_prefill', 'reference'",
    ),
    (call(backend=None), ValueError, "backend = None", "must be one of 'auto'"),
]


@pytest.mark.parametrize(
    ("fails", "error", "given", "allowed"),
    [pytest.param(*row, id=f"{row[2]}: {row[3]}"[:60]) for row in CONFIG + POLICY + PROBLEM + DISPATCH],
)
def test_message(fails: Callable[[], Any], error: type[Exception], given: str, allowed: str) -> None:
    with pytest.raises(error) as raised:
        fails()
    message = str(raised.value)
    assert given in message
    assert allowed in message
    assert "\n" not in message


def test_good_inputs_are_no_error() -> None:
    """Else the table would prove nothing."""
    assert call()().shape == (1, 4, 3, 6)
    assert call(config=finite, attn_mask=zeros(3, 5).log())().shape == (1, 4, 3, 6)


@pytest.mark.parametrize("function", [select, topk_mask])
def test_select_and_topk_mask_check_the_same(function: Callable[..., Any]) -> None:
    q, k = zeros(1, 4, 3, 8), zeros(1, 2, 5, 8)
    with pytest.raises(TypeError, match="must be a SparseKConfig"):
        function(q, k, config={})
    with pytest.raises(ValueError, match="batch and head size must be equal"):
        function(q, k[..., :7], config=SparseKConfig.pure(2))
    with pytest.raises(ValueError, match="must be a finite number"):
        function(q, k, config=SparseKConfig.pure(2), scale=float("nan"))
    with pytest.raises(ValueError, match="attn_mask has shape"):
        function(q, k, config=SparseKConfig.pure(2), attn_mask=zeros(4, 5))
    with pytest.raises(ValueError, match="NaN or infinity"):
        function(q, k.log(), config=finite)
