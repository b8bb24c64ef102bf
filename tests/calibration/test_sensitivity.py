"""Layer by layer: costs, what is kept and why, the table and the plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from calibrated import Calibrated
from PIL import Image

from gtr_deploy.calibration.layers import DEFAULT_KEEP
from gtr_deploy.calibration.plot import plot_bars
from gtr_deploy.calibration.probes import relative_error
from gtr_deploy.calibration.sensitivity import (
    COST_COLUMNS,
    GATES,
    Bench,
    LayerCost,
    choose_kept,
    cost_rows,
    layer_costs,
)
from gtr_deploy.runtime.commands.console import Reporter
from gtr_deploy.runtime.errors import GtrError, UsageError

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def bench(calibrated: Calibrated) -> Bench:
    graphs = calibrated.graphs
    return Bench(
        calibrated.architecture, graphs, calibrated.plan, calibrated.ranges("cpu"), calibrated.probes, "cpu", threads=1
    )


@pytest.fixture(scope="module")
def costs(bench: Bench) -> list[LayerCost]:
    return layer_costs(bench, QUIET)


def test_costs_cover_every_layer(bench: Bench, costs: list[LayerCost]) -> None:
    assert sorted(cost.layer for cost in costs) == sorted(bench.names)
    assert sum(cost.contribution for cost in costs) == pytest.approx(1)
    assert all(0 < cost.error < 0.05 for cost in costs)
    assert [cost.contribution for cost in costs] == sorted((cost.contribution for cost in costs), reverse=True)
    for kind in ("backbone", "modulation", "diffusion_step"):
        assert sum(cost.multiplications for cost in costs if cost.graph == kind) == pytest.approx(1)
    # Errors of single layers are independent to first order: their squares add up to the whole graph's.
    whole = bench.graph_error("backbone", [layer.name for layer in bench.layers["backbone"]])
    parts = sum(cost.error**2 for cost in costs if cost.graph == "backbone") ** 0.5
    assert whole == pytest.approx(parts, rel=0.3)


def test_the_layer_kept_by_default_is_the_worst_of_the_head(costs: list[LayerCost]) -> None:
    assert next(cost.layer for cost in costs if cost.graph == "diffusion_step") == DEFAULT_KEEP[0]


def test_auto_keeps_nothing_more_where_the_gate_holds(bench: Bench) -> None:
    kept, costs = choose_kept(bench, "auto", QUIET)
    assert kept.layers == DEFAULT_KEEP
    assert not costs
    assert kept.gate is not None
    assert kept.image_error < kept.gate
    assert "no more is needed" in kept.why


def test_auto_keeps_what_a_tighter_gate_needs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loose, _ = choose_kept(bench, "auto", QUIET)
    monkeypatch.setitem(GATES, "cpu", 0.75 * loose.image_error)
    kept, costs = choose_kept(bench, "auto", QUIET)
    assert kept.image_error <= 0.75 * loose.image_error
    assert set(DEFAULT_KEEP) < set(kept.layers)
    worst = [cost.layer for cost in costs if cost.layer not in DEFAULT_KEEP]
    assert set(kept.layers) - set(DEFAULT_KEEP) == set(worst[: len(kept.layers) - 1])
    assert "->" in kept.why


def test_a_number_keeps_the_worst(bench: Bench, costs: list[LayerCost]) -> None:
    kept, _ = choose_kept(bench, 2, QUIET)
    worst = [cost.layer for cost in costs if cost.layer not in DEFAULT_KEEP][:2]
    assert kept.layers == (*DEFAULT_KEEP, *worst)


def test_bad_requests(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for keep in (-1, 1000, "most", True):
        with pytest.raises(UsageError, match="--keep"):
            choose_kept(bench, keep, QUIET)
    monkeypatch.setitem(GATES, "cpu", 1e-9)
    with pytest.raises(GtrError, match="does not hold"):
        choose_kept(bench, "auto", QUIET)


def test_table_and_plot(costs: list[LayerCost], tmp_path: Path) -> None:
    assert {len(row) for row in cost_rows(costs)} == {len(COST_COLUMNS)}
    path = tmp_path / "plot.png"
    plot_bars(path, "costs", [(cost.layer, cost.error) for cost in costs[:12]])
    with Image.open(path) as image:
        height = image.height
    plot_bars(path, "many", [(str(index), 0.1 + index) for index in range(200)])
    with Image.open(path) as image:
        assert height < image.height < 1200  # only the worst of many have a bar
    plot_bars(path, "nothing", [("a", 0.0), ("b", float("inf"))])


def test_values_that_are_not_finite_are_an_infinite_error() -> None:
    import numpy as np

    assert relative_error([np.array([np.nan, 1])], [np.array([1.0, 1])]) == float("inf")
