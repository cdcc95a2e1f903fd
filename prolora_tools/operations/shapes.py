"""The geometry of every module of a compression: given, found in the factors, or chosen under a budget."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.core.allocation import Point, allocate, candidates
from prolora_tools.core.detection import Detection, detect
from prolora_tools.core.fitting import NO_MOMENTS, Sample, choose_strides, fit_many
from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import InputError, RequestError
from prolora_tools.operations.calibrate import DENSE
from prolora_tools.operations.threads import cores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from prolora_tools.core.fitting import AnyMatrix, Pair
    from prolora_tools.files.adapter import Adapter, AdapterModule

    MomentsOf = Callable[[str], Pair]

EPS = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Rounding units; what is stored in still fewer bits is taken for BF16."""
_SAMPLES = 8
"""Modules of a shared rank by which its strides are chosen."""
_LARGEST_NORM = 1e60
"""Of a factor, and of a module's dW: its fourth power, and sums of them, are float64 numbers."""
_EVERY = 1 << 25
"""Numbers in an adapter's factors up to which every module's error curve is measured; above, _TYPICAL of a kind."""
_TYPICAL = 4
_MOMENTS = 1 << 23
"""Numbers in the moments of the modules that are fitted as one batch."""


@dataclass
class Shapes:
    """Geometries by module, and what the config says for all.

    Attributes:
        modules: path -> geometry.
        default: the config's own values; its rank says nothing.
        detected: path -> how the factors are put back, for modules that were found to be expansions.
    """

    modules: dict[str, Geometry]
    default: Geometry
    detected: dict[str, Detection] = field(default_factory=dict)

    def set_default(self) -> None:
        """Let the config say what most modules have, and give modules without shared ranks its chunks."""
        sharing = Counter(_common(g) for g in self.modules.values() if g.shared)
        if sharing:
            most = max(sharing.values())
            self.default = next(_common(g) for g in self.modules.values() if g.shared and sharing[_common(g)] == most)
        for path, g in self.modules.items():
            if not g.shared:
                self.modules[path] = Geometry(g.rank, g.rank, self.default.chunks_a, self.default.chunks_b)

    def config(self, source: Adapter) -> dict[str, Any]:
        """The fields of adapter_config.json that tell the shapes; patterns only where modules differ."""
        default = self.default
        out: dict[str, Any] = {
            "unshared_r": default.unshared,
            "chunks_A": default.chunks_a,
            "chunks_B": default.chunks_b,
            "stride_A": default.stride_a,
            "stride_B": default.stride_b,
            "rotate": True,
            "unshared_pattern": {},
        }
        for path, g in self.modules.items():
            asked = replace(g, stride_a=default.stride_a, stride_b=default.stride_b)
            values = {
                "unshared": (g.unshared, default.unshared),
                "chunks_A": (g.chunks_a, default.chunks_a),
                "chunks_B": (g.chunks_b, default.chunks_b),
                "stride_A": (g.a.stride, asked.a.stride) if g.shared else (0, 0),
                "stride_B": (g.b.stride, asked.b.stride) if g.shared else (0, 0),
            }
            for name, (has, said) in values.items():
                if has != said:
                    out.setdefault(f"{name}_pattern", {})[f"^{path}"] = has
        ranks = {path: g.rank for path, g in self.modules.items() if g.rank != source.modules[path].geometry.rank}
        if ranks:  # the scaling of a module must stay what it was: alpha goes with the rank; the first match holds
            power = 0.5 if source.config.use_rslora else 1.0
            alphas = {f"^{p}": source.modules[p].scaling * rank**power for p, rank in ranks.items()}
            out["rank_pattern"] = {f"^{p}": rank for p, rank in ranks.items()} | source.config.rank_pattern
            out["alpha_pattern"] = alphas | source.config.alpha_pattern
        return out


def _common(g: Geometry) -> Geometry:
    """A geometry without its rank, to count alike ones."""
    return Geometry(10**9, g.unshared, g.chunks_a, g.chunks_b, g.stride_a, g.stride_b)


def given(source: Adapter, unshared: int, chunks: tuple[int, int], strides: tuple[int | None, int | None]) -> Shapes:
    """One shape for all, where a module's rank is below `unshared` all of it unshared.

    Raises:
        RequestError: a number is out of its range.
    """
    top = max(m.geometry.rank for m in source.modules.values())
    Geometry(top, unshared, *chunks, *strides)  # raises where the request itself is out of range
    modules = {
        path: Geometry(m.geometry.rank, min(unshared, m.geometry.rank), *chunks, *strides)
        for path, m in source.modules.items()
    }
    return Shapes(modules, Geometry(10**9, unshared, *chunks, *strides))


def detected(source: Adapter) -> Shapes:
    """The shapes that a LoRA was expanded from; modules that share nothing stay whole.

    Raises:
        InputError: no module is an expansion.
    """
    with ThreadPoolExecutor(cores()) as pool:
        found = dict(zip(source.modules, pool.map(_detect, source.modules.values()), strict=True))
    detections = {path: d for path, d in found.items() if d is not None}
    if not detections:
        raise InputError(
            "compress-no-structure",
            f"no module of {source.folder} is an expanded PRoLoRA, so the shape has to be said",
            hint="give --unshared and --chunks, --budget, --ratio or --max-error",
        )
    modules = {
        path: detections[path].geometry if path in detections else Geometry.lora(m.geometry.rank)
        for path, m in source.modules.items()
    }
    shapes = Shapes(modules, Geometry.lora(1), detections)
    shapes.set_default()
    return shapes


def factors(module: AdapterModule) -> tuple[AnyMatrix, AnyMatrix]:
    """A and B transposed, whose norms can be computed with.

    Raises:
        InputError: they are out of range, or as `AdapterModule.factors`.
    """
    a, b = module.factors()
    norms = [float(np.abs(x).max(initial=0.0)) * x.size**0.5 for x in (a, b)]
    largest = max(*norms, module.scaling * norms[0] * norms[1])
    if largest > _LARGEST_NORM:
        raise InputError(
            "compress-range",
            f"{module.path} has factors or a dW of norm up to {largest:.1e}, expected at most {_LARGEST_NORM:.0e}",
            hint="the training diverged or the file is damaged: use an earlier checkpoint",
        )
    return a, b.T


def statistics_at_once(module: AdapterModule) -> int:
    """How many modules like this may have their moments in memory together: dense ones are far larger than factors."""
    return max(_MOMENTS // sum(dim * min(dim, DENSE) for dim in (module.in_features, module.out_features)), 1)


def _detect(module: AdapterModule) -> Detection | None:
    return detect(*factors(module), EPS.get(module.dtype, EPS["BF16"]))


def structure(source: Adapter) -> str | None:
    """A note on a LoRA whose smallest module is an expanded PRoLoRA; None for any other adapter.

    One module is read: what the others are, compress tells.
    """
    if source.config.prolora or source.dora or not source.modules:
        return None
    smallest = min(source.modules.values(), key=lambda m: m.parameters)
    found = _detect(smallest)
    if found is None:
        return None
    basis = "" if found.stored else ", its ranks permuted or re-scaled"
    return (
        f"{smallest.path} is an expanded PRoLoRA ({found.geometry}){basis}: "
        f"prolora-tools compress {source.folder} -o OUT, without a shape, takes it back"
    )


def settle_strides(source: Adapter, shapes: Shapes, moments: MomentsOf) -> None:
    """Choose the strides of every shared rank and number of chunks, by modules spread over the adapter."""
    alike: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for path, g in shapes.modules.items():
        if not g.is_lora:
            alike[g.shared, g.chunks_a, g.chunks_b].append(path)

    def choose(paths: list[str]) -> tuple[int, int]:
        samples = []
        for number in range(min(_SAMPLES, len(paths))):
            path = paths[number * len(paths) // min(_SAMPLES, len(paths))]
            module = source.modules[path]
            samples.append(Sample(*factors(module), shapes.modules[path], module.scaling**2, moments(path)))
        return choose_strides(samples)

    with ThreadPoolExecutor(cores()) as pool:
        chosen = list(pool.map(choose, alike.values()))
    for paths, pair in zip(alike.values(), chosen, strict=True):
        for path in paths:
            g = shapes.modules[path]
            if pair != (g.a.stride, g.b.stride):
                shapes.modules[path] = replace(g, stride_a=pair[0], stride_b=pair[1])
    if len(set(chosen)) == 1:
        first = shapes.modules[next(iter(alike.values()))[0]]
        shapes.default = replace(shapes.default, stride_a=first.stride_a, stride_b=first.stride_b)


def chosen(source: Adapter, moments: MomentsOf, *, budget: int | None, error: float | None) -> Shapes:
    """The shapes that leave the least error within `budget` parameters, or cost the fewest within relative `error`.

    Raises:
        RequestError: nothing is as small as the budget.
    """
    paths = list(source.modules)
    curves, norm = _curves(source, moments)
    points = allocate([curves[p] for p in paths], budget=budget, error=None if error is None else (error * norm) ** 2)
    if points is None:
        least = sum(min(p.parameters for p in curves[path]) for path in paths)
        raise RequestError(
            "compress-budget",
            f"the smallest shapes take {least:,} parameters, and the budget leaves {budget:,} for the factors",
            hint=f"give a budget of {least:,} or more, beside what is no factor",
        )
    shapes = Shapes({p: point.geometry for p, point in zip(paths, points, strict=True)}, Geometry.lora(1))
    shapes.set_default()
    return shapes


def _curves(source: Adapter, moments: MomentsOf) -> tuple[dict[str, list[Point]], float]:
    """Every module's error curve, scaling included, and the norm of all dW together in the same norm."""
    kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for path, m in source.modules.items():
        kinds[path.rpartition(".")[2], m.in_features, m.out_features, m.geometry.rank].append(path)
    small = sum(m.parameters for m in source.modules.values()) <= _EVERY
    measured = [paths if small else paths[:: max(len(paths) // _TYPICAL, 1)] for paths in kinds.values()]

    def measure(job: tuple[list[str], list[Geometry]]) -> list[tuple[str, Point, float]]:
        paths, geometries = job
        modules = [source.modules[p] for p in paths]
        pairs, norms = [factors(m) for m in modules], [moments(p) for p in paths]
        out = []
        for geometry in geometries:
            qualities = [q for _, q in fit_many(pairs, geometry, moments=norms, quick=True)]
            size = geometry.parameters(modules[0].in_features, modules[0].out_features)
            for p, m, q in zip(paths, modules, qualities, strict=True):
                point = Point(geometry, size, (m.scaling * q.calibrated_error) ** 2)
                out.append((p, point, (m.scaling * q.calibrated_norm) ** 2))
        return out

    jobs: list[tuple[list[str], list[Geometry]]] = []
    for paths in measured:
        m = source.modules[paths[0]]
        shapes = candidates(m.geometry.rank, m.in_features, m.out_features)
        if moments(paths[0]) == NO_MOMENTS:
            jobs += [(paths, [g]) for g in shapes]
        else:  # moments are large, so they are read once, and not too many at a time
            most = statistics_at_once(m)
            jobs += [(paths[i : i + most], shapes) for i in range(0, len(paths), most)]
    known: dict[str, tuple[list[Point], float]] = {p: ([], 0.0) for paths in measured for p in paths}
    with ThreadPoolExecutor(cores()) as pool:
        for results in pool.map(measure, jobs):
            for path, point, norm in results:
                known[path] = [*known[path][0], point], norm
    if small:
        return {p: points for p, (points, _) in known.items()}, math.sqrt(sum(n for _, n in known.values()))
    return _typical(source, kinds, known, moments)


def _typical(
    source: Adapter,
    kinds: Mapping[tuple[Any, ...], list[str]],
    known: Mapping[str, tuple[list[Point], float]],
    moments: MomentsOf,
) -> tuple[dict[str, list[Point]], float]:
    """Curves of a kind's measured modules, in relative errors, scaled by every module's own norm."""
    curves, total = {}, 0.0
    for paths in kinds.values():
        models = [known[p] for p in paths if p in known]
        for path in paths:
            m = source.modules[path]
            quality = fit_many([factors(m)], Geometry.lora(m.geometry.rank), method="average", moments=[moments(path)])[
                0
            ][1]
            norm = (m.scaling * quality.calibrated_norm) ** 2
            total += norm
            curves[path] = [
                replace(
                    same[0],
                    error=norm
                    * sum(p.error / n if n else 0.0 for p, (_, n) in zip(same, models, strict=True))
                    / len(same),
                )
                for same in zip(*(points for points, _ in models), strict=True)
            ]
    return curves, math.sqrt(total)
