"""Every shape that a plan asks of every graph, and the few optimization profiles that cover them.

A plan fixes its shapes before it runs, so that engine profiles, warm-up and graph capture walk lists. Knows no engine
library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .chains import MODULATION_ROWS, chain_shape, modulation_parts
from .plan import ARStep, PlanSettings, SamplingPlan
from .selection import SCORED_RULES

Sizes = dict[str, int]
"""Axis letter to size; the letters are those of graphs.py."""

Range = tuple[int, int, int]
"""Smallest, best and largest size of one axis."""

Profile = dict[str, Range]
"""Axis letter to range."""


def step_shapes(step: ARStep, settings: PlanSettings, batch: int) -> list[tuple[str, Sizes, int]]:
    """(graph kind, sizes, calls) of one AR step at one batch size, for a backend that selects on the device."""
    guided = {"G": step.branches}
    rows = batch * step.predicted
    split = chain_shape(step)

    def chain(rows: int, steps: int) -> list[tuple[str, Sizes, int]]:
        vectors = step.branches * rows
        made = Counter(vectors * (stop - start) for start, stop in modulation_parts(steps, vectors))
        sizes = [("modulation", {"Q": vectors, "T": size}, count) for size, count in sorted(made.items())]
        return [*sizes, ("diffusion_step", {**guided, "N": rows}, steps)]

    shapes: list[tuple[str, Sizes, int]] = [
        ("backbone", {**guided, "B": batch, "V": step.known, "P": step.predicted, "R": step.context}, 1)
    ]
    if split.longer:
        if settings.fts in SCORED_RULES:
            shapes.append(("detail_score", {"B": batch, "P": step.predicted}, 1))
            shapes.append(("select_rows", {"B": batch, "P": step.predicted, "K": split.longer}, 1))
        longer = batch * split.longer
        shapes.append(("gather_rows", {**guided, "N": rows, "S": split.alone, "M": longer}, 1))
        shapes += chain(longer, split.alone)
        shapes.append(("merge_rows", {"N": rows, "M": longer, "S": split.common}, 1))
    return shapes + chain(rows, split.common)


def call_shapes(plan: SamplingPlan, batch: int) -> dict[str, list[Sizes]]:
    """Graph kind to the distinct sizes that a generation of ``batch`` images calls it with, in order of appearance."""
    found: dict[str, list[Sizes]] = {}
    for step in plan.steps:
        for kind, sizes, _ in step_shapes(step, plan.settings, batch):
            if sizes not in found.setdefault(kind, []):
                found[kind].append(sizes)
    if plan.pictures:
        found["decoder"] = [{"B": batch}]
    return found


def profiles(plans: Iterable[SamplingPlan], max_batch: int) -> dict[str, list[Profile]]:
    """Optimization profiles per graph kind for plans of one model: few and tight.

    One regime for a single image and one for 2 to ``max_batch``, each split into generation (few tokens, many calls)
    and reconstruction (half of the tokens at once). The best size of each axis is the median of the work at the
    regime's largest batch. The number of branches may be 1 in every profile: it only halves the rows, and a plan
    may guide some of its steps alone.
    """
    regimes = [(1, 1)] if max_batch == 1 else [(1, 1), (2, max_batch)]
    result: dict[str, list[Profile]] = {}
    plans = list(plans)
    for smallest, largest in regimes:
        groups: dict[tuple[str, bool], tuple[list[Sizes], list[tuple[Sizes, int]]]] = {}
        for plan in plans:
            last_stage = len(plan.settings.stage_steps) - 1
            for step in plan.steps:
                reconstructing = step.stage == last_stage > 0
                for kind, sizes, _ in step_shapes(step, plan.settings, smallest):
                    groups.setdefault((kind, reconstructing), ([], []))[0].append(sizes)
                for kind, sizes, calls in step_shapes(step, plan.settings, largest):
                    groups[kind, reconstructing][1].append((sizes, calls))
        for (kind, _), members in sorted(groups.items(), key=lambda item: item[0]):
            profile = _profile(*members)
            if profile not in result.setdefault(kind, []):
                result[kind].append(profile)
        if any(plan.pictures for plan in plans):
            result.setdefault("decoder", []).append({"B": (smallest, largest, largest)})
    return result


def _profile(least: Sequence[Sizes], most: Sequence[tuple[Sizes, int]]) -> Profile:
    """The box around all sizes; its best point is, axis by axis, the median of the work."""
    profile: Profile = {}
    for letter in least[0]:
        weighted = sorted((sizes[letter], _work(sizes) * calls) for sizes, calls in most)
        half = sum(weight for _, weight in weighted) / 2
        best, passed = 0, 0.0
        for best, weight in weighted:  # noqa: B007 - the size where the loop stops is the median
            passed += weight
            if passed >= half:
                break
        low, high = min(sizes[letter] for sizes in least), weighted[-1][0]
        if letter == "G":
            low = 1
        elif letter == "Q":
            low = max(1, low // 2)
        elif letter == "T":  # batches in between may make more or fewer reverse steps at once
            low, high = profile["Q"][0], max(high, MODULATION_ROWS)
        profile[letter] = (low, max(best, min(1, high)), high)  # kernels are not tuned on an empty tensor
    return profile


def _work(sizes: Sizes) -> int:
    """Grows with the rows that a call processes."""
    tokens = sum(sizes.get(letter, 0) for letter in "VPR")
    rows = sizes.get("B", 1) * sizes.get("N", 1) * sizes.get("T", 1)
    return sizes.get("G", 1) * rows * max(1, tokens)


def covering(candidates: Sequence[Profile], sizes: Mapping[str, int]) -> int | None:
    """Index of the profile that holds ``sizes`` and whose best sizes are nearest (by ratio); None if none does."""
    best: tuple[float, int] | None = None
    for index, profile in enumerate(candidates):
        if all(low <= sizes[letter] <= high for letter, (low, _, high) in profile.items()):
            ratios = [(sizes[letter] + 1) / (middle + 1) for letter, (_, middle, _) in profile.items()]
            distance = sum(max(ratio, 1 / ratio) - 1 for ratio in ratios)
            if best is None or distance < best[0]:
                best = (distance, index)
    return None if best is None else best[1]


def described(profile: Mapping[str, Range]) -> str:
    """For people: ``B=2..8 (8) V=0..124 (60)``; a single number where the range is one."""
    parts = []
    for letter, (low, middle, high) in profile.items():
        parts.append(f"{letter}={low}" if low == high else f"{letter}={low}..{high} ({middle})")
    return " ".join(parts)
