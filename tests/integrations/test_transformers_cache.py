"""SparseKCache: a DynamicCache in all that it does, and Sparse-K with it is Sparse-K without it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from sparsek import SparseKConfig
from sparsek.integrations.transformers import SparseKCache, enable, enabled
from sparsek.integrations.transformers_cache import SparseKLayer, index_of

from .tiny_models import LAYERS, gemma3, llama, tokens

SPARSE = SparseKConfig(top_k=5, sinks=2, window=4, dense_layers=(1,), min_context=0)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=[llama, gemma3], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return enable(request.param(), SPARSE)


def caches(model: Any) -> tuple[Any, Any]:
    return SparseKCache(model.config), DynamicCache(config=model.config)


def step(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return logits


def assert_same_step(model: Any, ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    torch.testing.assert_close(step(model, ours, ids), step(model, theirs, ids), rtol=1e-4, atol=1e-4)
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("steps", [[150, 1, 1, 1], [40, 70, 1, 30, 1], [1] * 20])
def test_prefill_chunks_and_steps(model: Any, steps: list[int]) -> None:
    ours, theirs = caches(model)
    for ids in tokens(2, sum(steps)).split(steps, 1):
        assert_same_step(model, ours, theirs, ids)


def test_full_attention_layers_have_an_index(model: Any) -> None:
    cache = SparseKCache(model.config)
    step(model, cache, tokens(2, 150))
    layers = [layer for layer in cache.layers if isinstance(layer, SparseKLayer)]
    assert len(layers) == (LAYERS if model.config.model_type == "llama" else 1)
    # Layer 1 is dense here: nothing has to be chosen, and nothing is indexed.
    lengths = [layer.index.length for layer in cache.layers if isinstance(layer, SparseKLayer)]
    assert lengths == ([150, 0, 150] if len(layers) == LAYERS else [0])


def test_crop() -> None:
    model = enable(llama(), SPARSE)
    ours, theirs = caches(model)
    ids = tokens(2, 150)
    assert_same_step(model, ours, theirs, ids)
    for remove in (1, 70, 3):
        ours.crop(-remove)
        theirs.crop(-remove)
        assert ours.layers[0].index.length == theirs.get_seq_length()
        assert_same_step(model, ours, theirs, tokens(2, 2, seed=remove))


def test_reorder_and_batch_selection() -> None:
    model = enable(llama(), SPARSE)
    ours, theirs = caches(model)
    assert_same_step(model, ours, theirs, tokens(2, 150))
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    assert_same_step(model, ours, theirs, tokens(4, 1))
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
    assert_same_step(model, ours, theirs, tokens(4, 2))
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([2, 0]))
    assert_same_step(model, ours, theirs, tokens(2, 3))
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([False, True]))
    assert_same_step(model, ours, theirs, tokens(1, 3))


def test_reset_and_reuse() -> None:
    model = enable(llama(), SPARSE)
    cache = SparseKCache(model.config)
    step(model, cache, tokens(2, 150))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same_step(model, cache, DynamicCache(config=model.config), tokens(3, 90, seed=7))


def test_left_padding() -> None:
    model = enable(llama(), SPARSE)
    ids, mask = tokens(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[1, :50] = 0
    results = []
    for cache in caches(model):
        first = model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache).logits[:, -1]
        second = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
        results.append(torch.stack([first, second]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
def test_generate(model: Any, options: dict[str, Any]) -> None:
    texts = []
    for cache in caches(model):
        torch.manual_seed(3)
        texts.append(model.generate(tokens(2, 100), past_key_values=cache, max_new_tokens=20, **options))
    assert torch.equal(*texts)


def test_a_deep_copy_goes_its_own_way() -> None:
    model = enable(llama(), SPARSE)
    prompt, theirs = caches(model)
    step(model, prompt, tokens(2, 130))
    step(model, theirs, tokens(2, 130))
    for seed in (1, 2):
        assert_same_step(model, copy.deepcopy(prompt), copy.deepcopy(theirs), tokens(2, 5, seed=seed))
    assert prompt.get_seq_length() == 130


def test_steps_do_not_copy_the_cache() -> None:
    model = enable(llama(), SPARSE)
    cache = SparseKCache(model.config)
    step(model, cache, tokens(1, 100))
    where = cache.layers[0].keys.data_ptr()
    for _ in range(20):
        step(model, cache, tokens(1, 1))
    assert cache.layers[0].keys.data_ptr() == where
    step(model, cache, tokens(1, 400))
    assert cache.layers[0].keys.data_ptr() != where


def test_memory_of_inference_mode_is_not_written_to_outside_of_it() -> None:
    model = enable(llama(), SPARSE)
    ours, theirs = caches(model)
    with torch.inference_mode():
        step(model, ours, tokens(2, 100))
        step(model, theirs, tokens(2, 100))
    assert_same_step(model, ours, theirs, tokens(2, 2))


def test_a_dense_model_can_use_it_and_be_trained() -> None:
    model = llama()
    ours, theirs = caches(model)
    assert_same_step(model, ours, theirs, tokens(2, 100))
    assert_same_step(model, ours, theirs, tokens(2, 1))
    with torch.enable_grad():
        step(model, SparseKCache(model.config), tokens(2, 10)).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_keys_that_were_changed_have_no_index() -> None:
    cache = SparseKCache(llama().config)
    keys, _ = cache.update(torch.ones(1, 2, 3, 12), torch.ones(1, 2, 3, 12), 0)
    assert index_of(keys) is cache.layers[0].index
    assert index_of(keys + 1) is None
    assert index_of(keys[:, :, :2]) is None


def test_enabled_can_be_switched_between_steps() -> None:
    """The index catches up with what was appended while the model was dense."""
    model = llama()
    ours, theirs = caches(model)
    assert_same_step(model, ours, theirs, tokens(2, 100))
    with enabled(model, SPARSE):
        assert_same_step(model, ours, theirs, tokens(2, 1))
    assert_same_step(model, ours, theirs, tokens(2, 80))
    with enabled(model, SPARSE):
        assert_same_step(model, ours, theirs, tokens(2, 1))


# ---- Caches that a program edits, keeps, copies and saves: all as with a DynamicCache


def of_layers(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def of_cache(cache: Any) -> None:
        for layer in cache.layers:
            change(layer)

    return of_cache


def assigned(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def assign(layer: Any) -> None:
        layer.keys, layer.values = change(layer.keys), change(layer.values)

    return of_layers(assign)


def other_tensors(like: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(x.shape, generator=generator) for x in (like.keys, like.values))  # type: ignore[return-value]


def replace(layer: Any) -> None:
    layer.keys, layer.values = other_tensors(layer)


def copy_into(layer: Any) -> None:
    for x, new in zip((layer.keys, layer.values), other_tensors(layer), strict=True):
        x.copy_(new)


def through_numpy(layer: Any) -> None:
    numbers = layer.keys.numpy()
    numbers[:, :, 20:90] = numbers[:, :, 20:90][:, :, ::-1].copy()


EDITS: dict[str, Callable[[Any], None]] = {
    "some tokens": assigned(lambda x: x[:, :, ::2].contiguous()),
    "the beginning": assigned(lambda x: x[:, :, :77]),
    "rows of the batch": assigned(lambda x: x[[1, 0]]),
    "other tensors": of_layers(replace),
    "written into": of_layers(copy_into),
    "changed in place": of_layers(lambda layer: layer.keys.mul_(-1)),
    "changed in part": of_layers(lambda layer: layer.keys[:, :, 30:60].mul_(-3)),
    "changed as data": of_layers(lambda layer: layer.keys.data.mul_(-1)),
    "changed through NumPy": of_layers(through_numpy),
    "values alone": of_layers(lambda layer: layer.values.mul_(-1)),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "cropped": lambda cache: cache.crop(-40),
    "cropped and changed": lambda cache: (cache.crop(-40), of_layers(lambda la: la.keys.mul_(-1))(cache)),  # type: ignore[return-value]
    "doubled": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices([0, 2])),  # type: ignore[return-value]
    "looked at": of_layers(lambda layer: layer.keys.sum()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_an_edited_cache(edit: Callable[[Any], None], inference: bool) -> None:
    model = enable(llama(), SPARSE)
    ours, theirs = caches(model)
    with torch.inference_mode() if inference else torch.no_grad():
        for count in (120, 1, 1):
            assert_same_step(model, ours, theirs, tokens(2, count))
        edit(ours)
        edit(theirs)
        for seed in range(3):
            assert_same_step(model, ours, theirs, tokens(2, 1, seed=seed))


def test_keys_changed_between_update_and_attention() -> None:
    cache = SparseKCache(llama().config)
    ones = torch.ones(1, 2, 3, 12)
    cache.update(ones, ones, 0)
    keys, _ = cache.update(ones, ones, 0)
    keys.mul_(2)
    assert index_of(keys) is None
    keys, _ = cache.update(ones, ones, 0)
    assert index_of(keys) is cache.layers[0].index
    assert cache.layers[0].index.length == 0


@pytest.mark.parametrize("look", ["layers", "slices", "numpy", "handed out"])
def test_what_was_kept_stays(look: str) -> None:
    model = enable(llama(), SPARSE)
    cache, _ = caches(model)
    step(model, cache, tokens(1, 100))
    step(model, cache, tokens(1, 1))
    kept: list[Any] = []
    for number, layer in enumerate(cache.layers):
        if look == "handed out":
            _, heads, _, size = layer.keys.shape
            kept.append(cache.update(*torch.randn(2, 1, heads, 1, size), number)[0])
        else:
            kept.append(layer.keys if look == "layers" else layer.keys[:, :, 50:])
    if look == "numpy":
        kept = [x.numpy() for x in kept]
    before = copy.deepcopy(kept)
    cache.crop(-51)
    step(model, cache, tokens(1, 30, seed=1))
    for layer in cache.layers:
        layer.keys.mul_(-1)
    for x, y in zip(kept, before, strict=True):
        assert (x == y).all()


@pytest.mark.parametrize("by", ["copy", "deepcopy"])
def test_branches(by: str) -> None:
    model = enable(llama(), SPARSE)
    ours, theirs = caches(model)
    assert_same_step(model, ours, theirs, tokens(1, 120))
    twins = [copy.copy(cache) for cache in (ours, theirs)]
    for twin, cache in zip(twins, (ours, theirs), strict=True):
        twin.layers = [getattr(copy, by)(layer) for layer in cache.layers]
    for seed in range(3):
        assert_same_step(model, ours, theirs, tokens(1, 3, seed=seed))
        assert_same_step(model, *twins, tokens(1, 2, seed=seed + 7))
    ours.crop(-5)
    theirs.crop(-5)
    for seed in range(2):
        assert_same_step(model, *twins, tokens(1, 1, seed=seed))
        assert_same_step(model, ours, theirs, tokens(1, 1, seed=seed + 7))


def test_nobody_else_holds_it_so_a_crop_costs_nothing() -> None:
    model = enable(llama(), SPARSE)
    cache, _ = caches(model)
    step(model, cache, tokens(1, 100))
    where = cache.layers[0].keys.data_ptr()
    for count in (3, 1, 7):
        cache.crop(-count)
        step(model, cache, tokens(1, 2))
    assert cache.layers[0].keys.data_ptr() == where


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_cache_can_be_saved(how: str) -> None:
    model = enable(llama(), SPARSE)
    ours, theirs = caches(model)
    assert_same_step(model, ours, theirs, tokens(1, 120))
    file = io.BytesIO()
    (pickle.dump if how == "pickle" else torch.save)((ours, ours.layers[0].keys), file)
    assert len(file.getvalue()) < 3 * 2 * LAYERS * ours.layers[0].keys.nbytes  # without its room
    file.seek(0)
    again, keys = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert torch.equal(keys, ours.layers[0].keys)
    for seed in range(2):
        assert_same_step(model, ours, theirs, tokens(1, 1, seed=seed))
    theirs.crop(-2)
    for seed in range(3):
        assert_same_step(model, again, theirs, tokens(1, 1, seed=seed + 5))
    assert pickle.loads(pickle.dumps(SparseKCache(model.config))).get_seq_length() == 0


def test_a_handed_out_tensor_can_be_saved_and_copied() -> None:
    ones = torch.ones(1, 2, 3, 12)
    keys, _ = SparseKCache(llama().config).update(ones, ones, 0)
    for twin in (pickle.loads(pickle.dumps(keys)), copy.deepcopy(keys)):
        assert torch.equal(twin, keys)
        assert index_of(twin) is None
