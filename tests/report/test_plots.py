"""The plots of a run's metrics: what they show, and that no label covers another."""

import pytest
from figures import assert_no_overlap

from hqqtrain.report.plots import (
    STEP_METRICS,
    best_step,
    plot_loss,
    plot_perplexities,
    plot_step_metric,
)


def rows(steps: int, **metrics) -> list[dict]:
    return [
        {"train/global_step": s, "train/loss": 3.0 - s / steps}
        | {name.replace("__", "/"): value(s) for name, value in metrics.items()}
        for s in range(1, steps + 1)
    ]


def test_loss_and_perplexity():
    assert_no_overlap(plot_perplexities({"full precision": 8.0, "quantized": 9e5, "trained": 9.0}))
    assert_no_overlap(plot_loss(rows(100_000)))
    assert plot_loss([{"train/global_step": 1, "eval/loss": 2.0}]) is None
    assert plot_loss([{"train/global_step": 1, "train/loss": 2.0}]) is not None
    assert plot_perplexities({}) is None


def test_the_step_with_the_lowest_held_out_loss_is_marked():
    history = rows(40)
    for step, loss in ((10, 2.5), (20, 2.25), (30, 2.75)):
        history[step - 1]["eval/loss"] = loss
    assert best_step([{"train/global_step": 0, "eval/loss": 1.0}, *history]) == 20
    figure = plot_loss(history)
    assert_no_overlap(figure)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["lowest held-out, step 20"].get_xdata() == [20, 20]
    assert lines["held-out"].get_xydata().tolist() == [[10, 2.5], [20, 2.25], [30, 2.75]]


def test_a_single_evaluation_is_not_the_best_of_several():
    assert best_step([]) is None
    assert (
        best_step([{"train/global_step": 0, "eval/loss": 1.0}, *rows(3, eval__loss=lambda s: None)])
        is None
    )
    assert best_step([{"train/global_step": 9, "eval/loss": 1.0}]) is None


@pytest.mark.parametrize("steps", [1, 7, 90_000])
@pytest.mark.parametrize("name", STEP_METRICS)
def test_metrics_of_every_step(name, steps):
    history = [{"train/global_step": s, name: 2e-5 + s / steps} for s in range(1, steps + 1)]
    figure = plot_step_metric(history, name)
    assert_no_overlap(figure)
    first = figure.axes[0].get_lines()[0].get_xydata()
    assert len(first) <= 601
    assert first[-1].tolist() == [steps, 2e-5 + 1.0]
    assert plot_step_metric([{"train/global_step": 1}], name) is None


def test_speed_and_memory_start_at_zero_and_a_spike_of_the_norm_is_logarithmic():
    values = {"train__tokens_per_second": lambda s: 1000 + s, "memory__peak_gib": lambda s: 20.0}
    history = rows(30, **values, train__grad_norm=lambda s: 900.0 if s == 9 else 1.0)
    for name in ("train/tokens_per_second", "memory/peak_gib"):
        assert plot_step_metric(history, name).axes[0].get_ylim()[0] == 0
    assert plot_step_metric(history, "train/grad_norm").axes[0].get_yscale() == "log"


def test_a_metric_that_is_zero_or_was_not_finite_is_drawn():
    history = [{"train/global_step": s, "memory/peak_gib": 0.0} for s in (1, 2)]
    history.append({"train/global_step": 3, "memory/peak_gib": None})
    figure = plot_step_metric(history, "memory/peak_gib")
    assert figure.axes[0].get_ylim() == (0, 1)
