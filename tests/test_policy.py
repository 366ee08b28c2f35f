"""From a configuration to one call's numbers, and the published rules of thumb for K."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsek import SparseKConfig, recommend_k
from sparsek.policy import (
    AUTO_SHARE,
    NO_LIMIT,
    Recommendation,
    Rule,
    auto_top_k,
    by_share,
    fixed,
    on_gpu,
    resolve,
)

from .strategies import examples

CONFIG = SparseKConfig(top_k=64, dense_layers=(0, 2), min_context=1024)


@pytest.mark.parametrize(
    ("context", "top_k"),
    [(1, 32), (1024, 32), (1599, 32), (1601, 48), (2048, 48), (4096, 64), (8192, 96), (131072, 368)],
)
def test_auto_takes_the_published_values(context: int, top_k: int) -> None:
    assert auto_top_k(context) == top_k


@examples(200)
@given(st.integers(1, 2**24))
def test_auto_is_the_square_root_to_the_nearest_16(context: int) -> None:
    top_k = auto_top_k(context)
    assert top_k % 16 == 0
    assert top_k == 32 or abs(top_k - math.sqrt(context)) <= 8


def test_a_rule_is_the_config_for_one_call() -> None:
    config = SparseKConfig(top_k=7, sinks=1, window=2, stride=3, tail="none", dense_layers=(), min_context=0)
    assert resolve(config, 100) == Rule(top_k=7, sinks=1, window=2, stride=3, tail="none")


@pytest.mark.parametrize(
    ("num_keys", "layer", "top_k"),
    [
        (1023, None, 1023),  # shorter than min_context: all
        (1024, None, 64),
        (2048, 1, 64),
        (2048, 2, 2048),  # a dense layer
        (2048, 0, 2048),
    ],
)
def test_dense_layers_and_short_contexts_keep_everything(
    num_keys: int, layer: int | None, top_k: int
) -> None:
    rule = resolve(CONFIG, num_keys, layer=layer)
    assert rule.top_k == top_k
    assert rule.keeps_all(num_keys) == (top_k == num_keys)


def test_more_than_all_keys_is_all_keys() -> None:
    rule = resolve(SparseKConfig.pure(500), 100)
    assert rule.top_k == 100
    assert rule.keeps_all(100)
    assert not resolve(SparseKConfig.pure(99), 100).keeps_all(100)


def test_auto_follows_the_length_of_the_call() -> None:
    config = replace(CONFIG, top_k="auto")
    assert [resolve(config, n).top_k for n in (2048, 8192)] == [48, 96]


def test_top_k_may_differ_by_layer() -> None:
    config = replace(CONFIG, top_k=(5, 64, "auto", "auto"), dense_layers=(0,))
    assert [resolve(config, 8192, layer=layer).top_k for layer in range(4)] == [8192, 64, 96, 96]
    rules = [resolve(replace(config, min_share=0.01), 8192, layer=layer) for layer in range(4)]
    assert [rule.top_k for rule in rules] == [8192, 64, NO_LIMIT, NO_LIMIT]
    assert [rule.min_share for rule in rules] == [0.0, 0.01, 0.01, 0.01]


def test_a_sliding_window_shortens_the_context() -> None:
    """What counts is how many keys a row can see, not how many a cache holds."""
    config = replace(CONFIG, top_k="auto")
    assert resolve(config, 8192, context=512).top_k == 8192  # below min_context: dense
    assert resolve(config, 8192, context=2048).top_k == 48
    assert resolve(config, 2048, context=8192).top_k == 48  # no more than there are
    shares = replace(config, min_share=0.01)
    assert resolve(shares, 8192, context=512).keeps_all(8192)
    assert not resolve(shares, 8192, context=2048).keeps_all(8192)


@examples(100)
@given(
    st.tuples(*[st.integers(0, 200)] * 4),
    st.integers(1, 300),
)
def test_most_kept_bounds_every_row(fields: tuple[int, int, int, int], num_keys: int) -> None:
    top_k, sinks, window, stride = fields
    always = set(range(sinks)) | set(range(num_keys - window, num_keys))
    always |= set(range(0, num_keys, stride)) if stride else set()
    kept = min(num_keys, len(always & set(range(num_keys))) + top_k)
    rule = Rule(top_k, sinks, window, stride, "none")
    most = rule.most_kept(num_keys)
    assert most is not None
    assert kept <= most <= num_keys
    assert replace(rule, min_share=0.1).most_kept(num_keys) is None


@pytest.mark.parametrize(
    ("context", "parameters", "expected"),
    [
        (2048, None, (32, 64, 48)),
        (4096, None, (64, 128, 64)),
        (8192, None, (128, 256, 96)),
        (10, None, (1, 1, 32)),
        (2048, 2e9, (32, 64, 48)),
        (2048, 7e9, (32, 64, 48)),
        (2048, 13e9, (32, 128, 48)),  # spans both rules
        (2048, 34e9, (32, 128, 48)),
        (4096, 7e9, (32, 128, 64)),
        (4096, 34e9, (64, 128, 64)),
        (4096, 70e9, (64, 256, 64)),
    ],
)
def test_recommended_k(context: int, parameters: float | None, expected: tuple[int, int, int]) -> None:
    assert recommend_k(context, parameters) == Recommendation(*expected)


def test_auto_becomes_a_number() -> None:
    assert fixed(SparseKConfig(), 8192) == SparseKConfig(top_k=96)
    assert fixed(SparseKConfig(top_k=(8, "auto")), 4096).top_k == (8, 64)
    assert fixed(SparseKConfig(top_k=7), 4096).top_k == 7


def test_a_share_is_no_number() -> None:
    shares = SparseKConfig(min_share=0.01), SparseKConfig((8, "auto"), min_share=0.01)
    for config in (*shares, SparseKConfig(64, min_share=0.01)):
        assert by_share(config)
        assert fixed(config, 8192) == config
    tiles = SparseKConfig((8, "auto"), select="tile")
    assert by_share(tiles)
    counts = SparseKConfig(), SparseKConfig(64), SparseKConfig((8, 16), select="tile")
    assert not any(by_share(config) for config in counts)


def test_on_a_gpu_lists_of_tiles_are_longer() -> None:
    assert on_gpu(SparseKConfig(top_k=64)) == SparseKConfig(top_k=384, select="tile")
    assert on_gpu(SparseKConfig(top_k=(8, "auto"))).top_k == (48, "auto")
    assert [on_gpu(SparseKConfig(top_k=k)).top_k for k in (341, 342, 3000)] == [2046, 2048, 3000]
    for config in (SparseKConfig(select="tile"), SparseKConfig(select="query"), SparseKConfig.pure(64)):
        assert on_gpu(config) == config
    assert fixed(SparseKConfig(), 8192, "cuda").top_k == "auto"
    assert fixed(SparseKConfig(), 8192, "cpu").top_k == 96


def test_a_share_is_a_rule_of_its_own_and_a_count_its_limit() -> None:
    tiles = SparseKConfig(select="tile", dense_layers=(1,))
    rule = resolve(tiles, 8193, layer=0)
    assert (rule.min_share, rule.top_k, rule.keeps_all(8193)) == (AUTO_SHARE, NO_LIMIT, False)
    assert rule == resolve(tiles, 8194, layer=0)  # nothing in it goes by the number of keys
    assert resolve(tiles, 8192, layer=1).keeps_all(8192)
    assert resolve(tiles, 100).keeps_all(100)
    counted = resolve(replace(tiles, top_k=500), 8192)
    assert (counted.min_share, counted.top_k) == (0.0, 500)
    both = resolve(replace(tiles, top_k=500, min_share=0.1), 8192)
    assert (both.min_share, both.top_k) == (0.1, 500)
    of_queries = resolve(SparseKConfig(min_share=0.1), 8192)
    assert (of_queries.min_share, of_queries.top_k, of_queries.tile) == (0.1, NO_LIMIT, 0)
    many = resolve(SparseKConfig(top_k=9000, min_share=0.1), 8192)
    assert not many.keeps_all(8192)
