"""`sparsek tune`: the cheapest configuration that meets a target, found by measuring.

Cost is the number of keys a query attends to, a mean over all layers and rows (a dense layer pays for all).
Four steps, each on the tuning text alone:

1. One K for all layers: the smallest that meets the target, which is what there is to beat. And one share of
   the softmax.
2. The form: other sinks and windows at the same number of keys, and the other tail.
3. Each layer: what it alone costs when it keeps little, and how its dropped mass falls with K.
4. K by layer, so that every key is spent where it gains most: one price for all layers, bisected until what
   is measured meets the target.

The answer is then measured on text that none of this has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch

from ..bench.counts import scores_used
from ..bench.environment import environment
from ..bench.timing import alternate, ratio
from ..config import SparseKConfig, Tail, TopK
from ..engines.base import Engine, Part, attending_layers, no_attention
from ..kernels.break_even import prompt_is_dense
from ..policy import by_share, on_device
from .journal import Journal
from .kept_keys import KeptObserver
from .quality import (
    EvalRecord,
    Windows,
    compare,
    evaluate,
    observed_logits,
    perplexity,
    standard_error,
)
from .sensitivity import DroppedMass, dropped_mass

BUDGETS: Final = (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_UNIFORM: Final = tuple(k for k in BUDGETS if k >= 8)
_SHARES: Final = (0.02, 0.01, 0.007, 0.005, 0.004, 0.003, 0.002, 0.0015, 0.001, 0.0007, 0.0005)
_FORMS: Final = ((4, 32), (4, 16), (1, 16), (1, 8))  # sinks and windows tried beside the given one
_OTHER_TAIL: Final[dict[Tail, Tail]] = {"none": "centroid", "centroid": "none"}
_EVERY: Final = 4  # tokens of the tuning text that are predicted: one in so many
_SEGMENT: Final = 16  # predicted tokens that make one sample of the standard error
_LEAST_CONTEXT: Final = 2 * _EVERY * _SEGMENT  # one sample has no standard error
_ALONE: Final = 8  # K at which a layer's own cost is measured
_STEPS: Final = 7  # of each bisection
_MARGIN: Final = 1.0  # standard errors by which the tuning text must do better than the target


@dataclass(frozen=True)
class Target:
    """What is to be met; exactly one is given. `max_kl` in nats, `max_ppl_ratio` and `min_speedup` (of the
    prompt, over the engine's dense attention) above 1.

    Raises:
        ValueError: none or several are given, or one is out of range.
    """

    max_kl: float | None = None
    max_ppl_ratio: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        given = {name: x for name, x in asdict(self).items() if x is not None}
        if len(given) != 1:
            raise ValueError("a target is one of max_kl, max_ppl_ratio and min_speedup")
        ((name, x),) = given.items()
        least = 0.0 if name == "max_kl" else 1.0
        if not (math.isfinite(x) and x > least):
            raise ValueError(f"{name} = {x}: must be above {least:g}")

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"KL <= {self.max_kl:g}"
        if self.max_ppl_ratio is not None:
            return f"perplexity ratio <= {self.max_ppl_ratio:g}"
        return f"speed-up >= {self.min_speedup:g}"

    def is_met_by(self, p: Point) -> bool:
        """Whether it is met with a standard error to spare."""
        if self.max_kl is not None:
            return p.kl + _MARGIN * p.kl_se <= self.max_kl
        if self.max_ppl_ratio is not None:
            return p.ppl_ratio + _MARGIN * p.ppl_ratio_se <= self.max_ppl_ratio
        assert self.min_speedup is not None
        assert p.speedup is not None
        return p.speedup >= self.min_speedup


@dataclass(frozen=True)
class Point:
    """A configuration that was measured on the tuning text. `keys`: a mean over rows and layers.
    `step`: what it was measured for. `speedup`: of the prompt, where the target asks for it."""

    step: str
    config: dict[str, Any]
    keys: float
    kl: float
    kl_se: float
    ppl_ratio: float
    ppl_ratio_se: float
    speedup: float | None


@dataclass(frozen=True)
class TuneRecord:
    """The answer. `uniform`: the cheapest form with one K that met the target; None where none did. `held`:
    the answer on text it was not tuned on. `met` and `met_held`: whether the target is met on either."""

    engine: str
    model: str
    text: str
    context: int
    target: str
    config: dict[str, Any]
    tuned: dict[str, Any]
    uniform: dict[str, Any] | None
    saved: float | None
    met: bool
    held: dict[str, Any]
    met_held: bool | None
    frontier: list[dict[str, Any]]
    environment: dict[str, Any]
    device: str = "cpu"


@dataclass
class Tuner:
    """Measures configurations on one window, and remembers what it measured.

    Args:
        windows: of which the first is tuned on and the second is held back.
        form: sinks, window, stride, tail and dense layers to begin with.
        say: is told each point as it is measured, and whether it is one of `points`.
    """

    engine: Engine
    windows: Windows
    form: SparseKConfig
    target: Target
    text_name: str
    journal: Journal
    say: Callable[[Point, bool], None] = lambda _, __: None
    points: list[Point] = field(default_factory=list)
    _dense: list[torch.Tensor] = field(default_factory=list)

    def tune(self) -> TuneRecord:
        """Find the answer.

        Raises:
            ValueError: the text is too short; the context is below `form.min_context`; the model has no
                attention; or no configuration meets the target, with the best that was found.
        """
        if self.windows.context < _LEAST_CONTEXT:
            raise ValueError(
                f"context = {self.windows.context}: must be at least {_LEAST_CONTEXT} tokens to tune on"
            )
        replace(self.windows, count=2).check(self.engine)
        if self.windows.context < self.form.min_context:
            raise ValueError(
                f"context = {self.windows.context}: attention is dense below min_context = "
                f"{self.form.min_context}, take a longer --context or a smaller --min-context"
            )
        channels = self.engine.num_heads * self.engine.head_size
        on_auto = self.engine.device == "cuda" and self.form.select == "auto"
        if on_auto and prompt_is_dense(self.windows.context, self.windows.context, channels):
            raise ValueError(
                f"context = {self.windows.context}: attention on a GPU is dense at this length, for that is "
                "faster, take a longer --context or --select tile"
            )
        if not attending_layers(self.engine):
            raise ValueError(f"nothing to tune, for {no_attention(self.engine.model)}")
        if self.target.min_speedup is not None:
            least = replace(self.form, top_k=BUDGETS[1], sinks=1, window=8, dense_layers=())
            self._must_be_met(self._measure("least", least))
        uniform = self._uniform()
        self._one_share()
        form = self._best_form(uniform)
        self._by_layer(form)
        candidates = [p for p in self.points if self.target.is_met_by(p)]
        if not candidates:
            self._must_be_met(min(self.points, key=self._distance))
        answer = min(candidates, key=self._merit)
        return self._record(answer, uniform if self.target.is_met_by(uniform) else None)

    def _must_be_met(self, nearest: Point) -> None:
        if not self.target.is_met_by(nearest):
            raise ValueError(
                f"no configuration reaches {self.target}; the best found is {self._value(nearest):.4g}, with "
                f"{nearest.keys:.0f} keys a query"
            )

    # ---- The four steps

    def _uniform(self) -> Point:
        """The cheapest of `_UNIFORM` that meets the target (for a speed-up, the dearest)."""
        budgets = [k for k in _UNIFORM if k < self.windows.context / 2]
        return self._cheapest("one K", [replace(self.form, top_k=k, min_share=0.0) for k in budgets])

    def _one_share(self) -> Point:
        """The same of `_SHARES`."""
        return self._cheapest(
            "one share", [replace(self.form, top_k="auto", min_share=share) for share in _SHARES]
        )

    def _cheapest(self, step: str, configs: list[SparseKConfig]) -> Point:
        """Of configurations that keep more and more."""
        measured: dict[int, Point] = {}

        def point(i: int) -> Point:
            if i not in measured:
                measured[i] = self._measure(step, configs[i])
            return measured[i]

        low, high = 0, len(configs) - 1
        if self.target.min_speedup is not None:  # the largest K that is fast enough
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.target.is_met_by(point(middle)) else (low, middle - 1)
        else:
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.target.is_met_by(point(middle)) else (middle + 1, high)
        return point(low)

    def _best_form(self, uniform: Point) -> SparseKConfig:
        """Other sinks and windows, with as many keys, and the other tail; the one of least KL."""
        start = SparseKConfig.from_dict(uniform.config)
        assert isinstance(start.top_k, int)
        room = start.top_k + start.sinks + start.window
        found = [uniform]
        for sinks, window in _FORMS:
            if room - sinks - window > 0:
                config = replace(start, sinks=sinks, window=window, top_k=room - sinks - window)
                found.append(self._measure("form", config))
        found.append(self._measure("form", replace(start, tail=_OTHER_TAIL[start.tail])))
        best = min(found, key=lambda p: p.kl)
        return SparseKConfig.from_dict(best.config)

    def _by_layer(self, form: SparseKConfig) -> None:
        curves = self._curves(form)
        alone = {layer: self._alone(layer, form) for layer in curves}
        top_k = form.top_k
        assert isinstance(top_k, int)
        power = self._fitted_power(alone, curves, form)

        def cost_of(layer: int, budget: int | None) -> float:
            """KL that the layer brings, by its dropped mass; None is dense."""
            if budget is None:
                return 0.0
            return _modelled(alone[layer], curves[layer], budget, power)

        def config_at(price: float) -> SparseKConfig:
            """Each layer keeps what minimises KL + price x keys."""
            dense_keys = self.windows.context / 2
            budgets: list[TopK] = [top_k] * self.engine.num_layers
            dense: list[int] = [layer for layer in self.form.dense_layers if layer not in curves]
            for layer in curves:
                options: list[int | None] = [k for k in BUDGETS if k < dense_keys]
                if form.sinks + form.window + form.stride == 0:
                    options.remove(0)
                options.append(None)
                best = min(
                    options, key=lambda k: cost_of(layer, k) + price * (dense_keys if k is None else k)
                )
                if best is None:
                    dense.append(layer)
                else:
                    budgets[layer] = best
            return replace(form, top_k=tuple(budgets), dense_layers=tuple(sorted(dense)))

        low, high = -18.0, 0.0  # logarithms of the price: low is dear in keys, high cheap
        seen: dict[SparseKConfig, Point] = {}
        for _ in range(_STEPS):
            middle = (low + high) / 2
            config = config_at(math.exp(middle))
            if config not in seen:
                seen[config] = self._measure("K by layer", config)
            point = seen[config]
            # A better quality is wanted when it is not met, or when speed is what is asked for and met.
            if self.target.is_met_by(point) == (self.target.min_speedup is None):
                low = middle
            else:
                high = middle

    # ---- What they measure

    def _curves(self, form: SparseKConfig) -> dict[int, DroppedMass]:
        made = self.journal.get(
            f"dropped mass: {form.sinks}, {form.window}, {form.stride}",
            lambda: {
                layer: asdict(curve)
                for layer, curve in dropped_mass(self.engine, self.windows.window(0), form, BUDGETS).items()
            },
        )
        return {
            int(layer): DroppedMass(tuple(c["budgets"]), tuple(c["dropped"])) for layer, c in made.items()
        }

    def _alone(self, layer: int, form: SparseKConfig) -> float:
        """KL with this layer sparse at a small K, and all others dense."""
        others = tuple(other for other in range(self.engine.num_layers) if other != layer)
        config = replace(form, top_k=_ALONE, dense_layers=others)
        return max(self._measure(f"layer {layer} alone", config, keep=False).kl, 1e-9)

    def _fitted_power(
        self, alone: dict[int, float], curves: dict[int, DroppedMass], form: SparseKConfig
    ) -> float:
        """How KL goes with dropped mass: the power that fits what was measured with one K."""
        points = []
        for p in self.points:
            config = SparseKConfig.from_dict(p.config)
            same = (config.sinks, config.window, config.tail) == (form.sinks, form.window, form.tail)
            if same and isinstance(config.top_k, int) and p.kl > 0:
                points.append((config, p.kl))
        if not points:
            return 1.5

        def error(power: float) -> float:
            total = 0.0
            for config, kl in points:
                assert isinstance(config.top_k, int)
                modelled = sum(
                    _modelled(alone[layer], curve, config.top_k, power)
                    for layer, curve in curves.items()
                    if layer not in config.dense_layers
                )
                total += math.log(max(modelled, 1e-12) / kl) ** 2
            return total

        return min((0.5 + 0.1 * i for i in range(31)), key=error)

    def _measure(self, step: str, config: SparseKConfig, *, keep: bool = True) -> Point:
        made = self.journal.get(f"point: {config.to_dict()}", lambda: self._measured(config))
        point = Point(step, config.to_dict(), **made)
        if keep:
            self.points.append(point)
        self.say(point, keep)
        return point

    def _measured(self, config: SparseKConfig) -> dict[str, Any]:
        window = self.windows.window(0)
        rows, followers = self._dense_rows(window), torch.tensor(window[1:])[::_EVERY]
        found, start = [], 0
        shares = by_share(on_device(config, self.engine.device))
        observer = KeptObserver() if shares else None
        for dense, chunk in zip(rows, self._logits(window, config, observer), strict=True):
            count = min(len(chunk), len(followers) - start)
            following = followers[start : start + count]
            found.append(compare(dense[:count], chunk[:count].log_softmax(-1).cpu(), following))
            start += count
        each = torch.cat(found)
        parts = [part for part in torch.split(each, _SEGMENT) if len(part) == _SEGMENT]
        ratio_ = perplexity(float((each[:, 1] - each[:, 0]).mean()))
        return {
            "keys": self._keys(config, observer, len(window)),
            "kl": float(each[:, 2].mean()),
            "kl_se": standard_error([float(part[:, 2].mean()) for part in parts]) or 0.0,
            "ppl_ratio": ratio_,
            "ppl_ratio_se": ratio_
            * (standard_error([float((part[:, 1] - part[:, 0]).mean()) for part in parts]) or 0.0),
            "speedup": self._speedup(window, config) if self.target.min_speedup is not None else None,
        }

    def _keys(self, config: SparseKConfig, observer: KeptObserver | None, tokens: int) -> float:
        """That a row attends to, a mean over rows and layers: counted, or as they were observed."""
        layers = self.engine.num_layers
        if observer is not None:
            return sum(observer.scores(layer, tokens) for layer in range(layers)) / (tokens * layers)
        kept, _ = scores_used(on_device(config, self.engine.device), tokens, layers, 1)
        return kept / (tokens * layers)

    def _dense_rows(self, window: list[int]) -> list[torch.Tensor]:
        """Log-probabilities of dense attention, kept: every configuration is compared with them."""
        if not self._dense:
            self._dense = [chunk.log_softmax(-1).cpu() for chunk in self._logits(window, None)]
        return self._dense

    def _logits(
        self, window: list[int], config: SparseKConfig | None, observer: KeptObserver | None = None
    ) -> Any:
        return observed_logits(self.engine, [Part(window, config, scored=_EVERY)], observer, lambda _: None)

    def _speedup(self, window: list[int], config: SparseKConfig) -> float:
        def prompt(c: SparseKConfig | None) -> Callable[[], float]:
            return lambda: sum(seconds for _, seconds in self.engine.prompt(window, c))

        dense, sparse = alternate([prompt(None), prompt(config)], 2)
        return ratio(dense, sparse)[0]

    # ---- The target

    def _value(self, p: Point) -> float:
        if self.target.max_kl is not None:
            return p.kl
        return p.ppl_ratio if self.target.max_ppl_ratio is not None else p.speedup or 0.0

    def _distance(self, p: Point) -> float:
        return -self._value(p) if self.target.min_speedup is not None else self._value(p)

    def _merit(self, p: Point) -> float:
        """Less is better among those that meet the target: keys; or KL, where speed is what was asked for."""
        return p.kl if self.target.min_speedup is not None else p.keys

    def _held_is_met(self, held: EvalRecord) -> bool | None:
        if self.target.max_kl is not None:
            return held.kl_mean <= self.target.max_kl
        if self.target.max_ppl_ratio is not None:
            return held.ppl_ratio <= self.target.max_ppl_ratio
        return None

    def _record(self, answer: Point, uniform: Point | None) -> TuneRecord:
        config = SparseKConfig.from_dict(answer.config)
        windows = replace(self.windows, first=self.windows.first + 1, count=1)
        (held,) = evaluate(self.engine, [config], windows, text_name=self.text_name, journal=self.journal)
        return TuneRecord(
            engine=self.engine.name,
            model=self.engine.model,
            text=self.text_name,
            context=self.windows.context,
            target=str(self.target),
            config=answer.config,
            tuned=asdict(answer),
            uniform=None if uniform is None else asdict(uniform),
            saved=None if uniform is None else 1 - answer.keys / uniform.keys,
            met=self.target.is_met_by(answer),
            held=asdict(held),
            met_held=self._held_is_met(held),
            frontier=[asdict(p) for p in self.points],
            environment=environment(),
            device=self.engine.device,
        )


def _modelled(alone: float, curve: DroppedMass, budget: int, power: float) -> float:
    """KL that a layer brings when it keeps `budget` keys, from what it brings with `_ALONE`."""
    return float(alone * (curve.at(budget) / max(curve.at(_ALONE), 1e-9)) ** power)


def steps(engine: Engine) -> int:
    """About how many points a run measures."""
    return math.ceil(math.log2(len(_UNIFORM))) + len(_FORMS) + 1 + engine.num_layers + _STEPS
