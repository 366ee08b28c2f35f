"""`enable` takes models whose own logits come out when everything is kept, and refuses the others at once.

Some architectures here, all that Transformers has with `--all-architectures` (`make test-architectures`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
import transformers

from sparsek import SparseKConfig
from sparsek.integrations import transformers as integration
from sparsek.integrations.transformers_models import why_not

from .architectures import VOCABULARY, Architecture, all_architectures

EVERYTHING: Final = SparseKConfig.pure(2**31 - 1)
LENGTH, PADDED, STEPS = 40, 9, 6
CLOSE: Final = 1e-4

# The selection; Transformers' names.
TAKEN: Final = (
    *(
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "MistralForCausalLM",
    ),
    *("MixtralForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "StableLmForCausalLM"),
    *(
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma4ForCausalLM",
        "Llama4ForCausalLM",
    ),
    *(
        "Cohere2ForCausalLM",
        "SmolLM3ForCausalLM",
        "DeepseekV3ForCausalLM",
        "BambaForCausalLM",
        "JambaForCausalLM",
    ),
    *(
        "Lfm2ForCausalLM",
        "RecurrentGemmaForCausalLM",
        "Zamba2ForCausalLM",
        "BertLMHeadModel",
        "BartForCausalLM",
    ),
    *("BartForConditionalGeneration", "MarianMTModel", "M2M100ForConditionalGeneration"),
    *(
        "T5GemmaForConditionalGeneration",
        "GotOcr2ForConditionalGeneration",
        "PaliGemmaForConditionalGeneration",
    ),
)
REFUSED: Final = (
    *(
        "BigBirdPegasusForCausalLM",
        "BigBirdPegasusForConditionalGeneration",
        "NllbMoeForConditionalGeneration",
    ),
    *("PegasusXForConditionalGeneration", "GitForCausalLM", "T5ForConditionalGeneration"),
    *("LongT5ForConditionalGeneration", "GptOssForCausalLM", "DeepseekV32ForCausalLM", "BloomForCausalLM"),
    *("FalconForCausalLM", "RwkvForCausalLM", "MambaForCausalLM"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        chosen = all_architectures()
        if not metafunc.config.getoption("--all-architectures"):
            chosen = [a for a in chosen if a.name in {*TAKEN, *REFUSED}]
        metafunc.parametrize("architecture", chosen, ids=[a.name for a in chosen])


@pytest.fixture(autouse=True)
def _quiet_and_small() -> Iterator[None]:
    """Without warnings about odd sizes; with one thread, for so small models wait for a second one."""
    before, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(before)


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(seed))


class Runs:
    """What a model makes of some inputs: logits [2, LENGTH, vocabulary] by the name of the way."""

    def __init__(self, model: Any, decodes: bool) -> None:
        self.model, self.name = model, "decoder_" if decodes else ""
        self.given = {"input_ids": tokens(33, 1)} if decodes else {}
        self.ids = tokens(LENGTH, 2)
        self.changed = self.ids.clone()
        self.changed[:, -1] = 7
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :PADDED] = 0

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        out = self.model(**self.given, **{f"{self.name}input_ids": ids}, **options)
        assert out.logits.isfinite().all()
        return out.logits.double()

    def plain(self) -> torch.Tensor:
        return self.logits(self.ids, use_cache=False)

    def filling_a_cache(self) -> torch.Tensor:
        return self.logits(self.ids, use_cache=True)

    def padded(self) -> torch.Tensor:
        out = self.logits(self.ids, **{f"{self.name}attention_mask": self.mask}, use_cache=False)
        out[0, :PADDED] = 0
        return out

    def last_rows(self) -> torch.Tensor:
        out = self.plain()
        out[:, -STEPS:] = self.logits(self.ids, logits_to_keep=STEPS, use_cache=False)[:, -STEPS:]
        return out

    def step_by_step(self) -> torch.Tensor:
        cache = None
        parts = []
        for part in (self.ids[:, :-STEPS], *self.ids[:, -STEPS:].split(1, dim=1)):
            with torch.no_grad():
                out = self.model(
                    **self.given, **{f"{self.name}input_ids": part}, use_cache=True, past_key_values=cache
                )
            cache = out.past_key_values
            parts.append(out.logits.double())
        return torch.cat(parts, 1)

    def leak(self) -> float:
        """How far earlier logits move when the last token changes."""
        moved = self.logits(self.changed, use_cache=False) - self.plain()
        return float(moved[:, :-1].abs().max())


WAYS: Final = (Runs.plain, Runs.filling_a_cache, Runs.padded, Runs.last_rows, Runs.step_by_step)


def difference(ours: torch.Tensor, dense: torch.Tensor) -> float:
    return float((ours - dense).norm() / dense.norm())


def results(runs: Runs) -> dict[str, torch.Tensor]:
    """By way; ways that this model does not have are left out."""
    found = {}
    for way in WAYS:
        try:
            found[way.__name__] = way(runs)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, NotImplementedError):
            if way is Runs.plain:
                raise
    return found


def test_model_is_its_own_or_refused(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        runs = Runs(architecture.model(), architecture.decodes)
        dense = results(runs)
        runs.model.set_attn_implementation("eager")
        eager, leak = results(runs), runs.leak()
    except Exception as error:  # in as many ways as there are architectures
        if architecture.name in {*TAKEN, *REFUSED}:
            raise
        pytest.skip(f"cannot be run tiny, on texts: {type(error).__name__} {str(error)[:80]}")
    reason = why_not(runs.model)
    if reason is None:
        assert architecture.name not in REFUSED
        integration.enable(runs.model, EVERYTHING)
        seen: list[int] = []
        with integration.observed(lambda layer, *_: seen.append(layer)):
            ours = results(runs)
        assert seen
        assert ours.keys() >= eager.keys() & dense.keys()
        apart = {
            way: min(difference(ours[way], host[way]) for host in (eager, dense) if way in host)
            for way in ours
            if way in eager or way in dense
        }
        assert max(apart.values()) < CLOSE, apart
        assert runs.leak() <= leak + CLOSE
        return
    assert architecture.name not in TAKEN, reason
    with pytest.raises(ValueError, match="Sparse-K cannot be switched on in it"):
        integration.enable(runs.model, EVERYTHING)
    assert not _right_all_the_same(runs, eager, monkeypatch), f"refused without need: {reason}"


def _right_all_the_same(runs: Runs, eager: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether our attention, forced upon a model that is refused, gives the model's own logits."""
    monkeypatch.setattr(integration, "_refuse_unsupported", lambda *_: None)
    seen: list[int] = []
    try:
        runs.model.set_attn_implementation(integration.NAME)
        with integration.observed(lambda layer, *_: seen.append(layer)):
            ours = results(runs)
    except Exception:
        return False
    return bool(seen) and all(difference(ours[way], eager[way]) < CLOSE for way in eager if way in ours)
