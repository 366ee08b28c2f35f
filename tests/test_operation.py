"""attention() under everything with which PyTorch looks at a function: the right result, or one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparsek import SparseKConfig, attention, select, topk_mask
from sparsek.integrations.transformers import SparseKCache, enable

from .integrations import tiny_models

RULES = {
    "top-K": SparseKConfig.pure(8),
    "dense": SparseKConfig.pure(64),
    "tail": SparseKConfig(top_k=8, sinks=2, window=4, min_context=0, dense_layers=()),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def inputs(seed: int, *lead: int, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*lead, 1, h, 64, 16, generator=rng) for h in (4, kv_heads, kv_heads))


class Attending(torch.nn.Module):
    def __init__(self, rule: SparseKConfig) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, config=self.rule, is_causal=True)


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any) -> Any:
        return self.model(ids, use_cache=False).logits


RECORDS: dict[str, Callable[[Any], Any]] = {
    "torch.jit.trace": lambda f: torch.jit.trace(f, inputs(0)),
    "make_fx": lambda f: make_fx(f)(*inputs(0)),
    "make_fx, fake": lambda f: make_fx(f, tracing_mode="fake")(*inputs(0)),
    "make_fx, functional": lambda f: make_fx(torch.func.functionalize(f))(*inputs(0)),
    "torch.export": lambda f: torch.export.export(f, inputs(0)).module(),
    "functionalize": torch.func.functionalize,
}


@every_rule
@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
@pytest.mark.filterwarnings("ignore")
def test_a_record_computes_with_what_it_is_given(record: Callable[[Any], Any], rule: SparseKConfig) -> None:
    plain = Attending(rule)
    recorded = record(plain)
    for seed in (1, 2):
        torch.testing.assert_close(recorded(*inputs(seed)), plain(*inputs(seed)))


@every_rule
def test_vmap(rule: SparseKConfig) -> None:
    q, k, v = inputs(0, 3)
    allowed = torch.rand(3, 1, 4, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.9

    def one(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return attention(q, k, v, config=rule, attn_mask=mask, is_causal=True)

    expected = torch.stack([one(*each) for each in zip(q, k, v, allowed, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(q, k, v, allowed), expected)
    last = torch.func.vmap(one, in_dims=(-1, None, None, 2), out_dims=1)(
        q.movedim(0, -1), k[0], v[0], allowed[:, 0, 0].movedim(0, 2)
    )
    expected = torch.stack([one(x, k[0], v[0], m[0, 0]) for x, m in zip(q, allowed, strict=True)], 1)
    torch.testing.assert_close(last, expected)


@every_rule
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_forward_mode(rule: SparseKConfig, kv_heads: int) -> None:
    x = tuple(t.double() for t in inputs(0, kv_heads=kv_heads))
    along = tuple(t.double() for t in inputs(5, kv_heads=kv_heads))
    f = Attending(rule)
    step = 1e-6
    up, down = (f(*(t + s * d for t, d in zip(x, along, strict=True))) for s in (step, -step))
    value, slope = torch.func.jvp(f, x, along)
    torch.testing.assert_close(value, f(*x))
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-4, atol=1e-6)
    single, along32 = inputs(0, kv_heads=kv_heads), inputs(5, kv_heads=kv_heads)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(single, along32, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(f(*dual)).tangent
    torch.testing.assert_close(tangent, slope.float(), rtol=1e-3, atol=1e-4)


def test_gradients_of_functions() -> None:
    f = Attending(RULES["tail"])
    q, k, v = (x.requires_grad_() for x in inputs(0))
    f(q, k, v).sin().sum().backward()
    got = torch.func.grad(lambda *x: f(*x).sin().sum(), argnums=(0, 1, 2))(*inputs(0))
    for x, gradient in zip((q, k, v), got, strict=True):
        torch.testing.assert_close(gradient, x.grad)


def test_tensors_without_data() -> None:
    with FakeTensorMode():
        out = attention(*inputs(0), config=RULES["tail"], is_causal=True)
        assert (out.shape, out.dtype) == ((1, 4, 64, 16), torch.float32)
        with pytest.raises(ValueError, match="batch and head size must be equal"):
            attention(torch.ones(2, 4, 8, 16), *inputs(0)[1:], config=RULES["tail"])


@pytest.mark.parametrize("function", [select, topk_mask], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "how", [torch.func.vmap, torch.func.functionalize, lambda f: make_fx(f)(*inputs(0)[:2])]
)
def test_what_depends_on_values_is_refused(function: Callable[..., Any], how: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(\) is called where PyTorch records it .*$"):
        how(lambda q, k: function(q, k, config=RULES["top-K"]))(*inputs(0, 3)[:2])
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensor that has no data"):
        function(*inputs(0)[:2], config=RULES["top-K"])


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_recorded() -> None:
    model = enable(tiny_models.llama(), RULES["tail"])
    ids, other = tiny_models.tokens(1, 64), tiny_models.tokens(1, 64, seed=3)
    with torch.no_grad():
        expected = model(other, use_cache=False).logits
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(ids, past_key_values=SparseKCache(model.config)).logits.shape == expected.shape
        recorded = torch.jit.trace(Logits(model), ids)
        torch.testing.assert_close(recorded(other), expected)
        exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
        torch.testing.assert_close(exported(other, use_cache=False).logits, expected)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_numpy_views_of_any_strides(rule: SparseKConfig) -> None:
    plain = [x.numpy() for x in inputs(0)]
    expected = attention(*plain, config=rule, is_causal=True)
    pair = np.dtype([("a", "f4"), ("b", "i1")])  # 5 bytes

    def packed(x: Any) -> Any:
        room = np.zeros(x.shape, pair)
        room["a"] = x
        return room["a"]

    def unaligned(x: Any) -> Any:
        room = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
        room[...] = x
        return room

    def read_only(x: Any) -> Any:
        x = x.copy()
        x.flags.writeable = False
        return x

    for form in (packed, unaligned, read_only, lambda x: x[..., ::-1].copy()[..., ::-1], np.asfortranarray):
        np.testing.assert_allclose(
            attention(*map(form, plain), config=rule, is_causal=True), expected, rtol=1e-5
        )
        kept = select(*map(form, plain[:2]), config=rule, is_causal=True)
        assert (kept.counts == select(*plain[:2], config=rule, is_causal=True).counts).all()
