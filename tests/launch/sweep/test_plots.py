"""The Pareto front, and plots of jobs with complete and with missing metrics."""

import io

import matplotlib.image
from figures import assert_no_overlap
from hypothesis import given
from hypothesis import strategies as st

from hqqtrain.launch.sweep.plots import AXES, CostPoint, pareto_front, plot_cost
from hqqtrain.launch.sweep.results import COLUMNS, TableRow

POINTS = st.lists(st.builds(CostPoint, st.integers(0, 6), st.integers(0, 6)), max_size=12)


def is_dominated(point: CostPoint, by: CostPoint) -> bool:
    return by.cost <= point.cost and by.perplexity <= point.perplexity and by[:2] != point[:2]


@given(POINTS)
def test_the_front_is_every_point_that_no_other_dominates(points):
    expected = sorted(p for p in points if not any(is_dominated(p, other) for other in points))
    assert pareto_front(points) == expected


def test_ties():
    same = [CostPoint(2, 9.0, "a"), CostPoint(2, 9.0, "b")]
    assert pareto_front(same) == same
    assert pareto_front([CostPoint(2, 9.0), CostPoint(3, 9.0)]) == [CostPoint(2, 9.0)]
    assert pareto_front([CostPoint(2, 9.0), CostPoint(2, 8.0)]) == [CostPoint(2, 8.0)]
    assert pareto_front([]) == []


def row(label: str = "2", **metrics: float) -> TableRow:
    return TableRow({"quant.nbits": label}, dict.fromkeys(COLUMNS) | metrics, "done", "runs/x")


def labels(figure) -> set[str]:
    return {line.get_label() for line in figure.axes[0].get_lines()}


def test_jobs_without_both_figures_are_left_out():
    rows = [
        row(bits_per_weight=2.5, perplexity_quantized=30.0, perplexity_final=12.0),
        row(bits_per_weight=3.5),
        row(perplexity_quantized=1.0),
        row(),
    ]
    figure = plot_cost(rows, AXES["bits"])
    assert figure is not None
    quantized, trained, front = figure.axes[0].get_lines()
    assert quantized.get_xydata().tolist() == [[2.5, 30.0]]
    assert trained.get_xydata().tolist() == front.get_xydata().tolist() == [[2.5, 12.0]]
    assert plot_cost(rows, AXES["seconds"]) is None
    assert plot_cost([row()], AXES["bits"]) is None


def test_seconds_and_memory_are_those_of_the_model_that_was_measured():
    trained = row(
        quantize_seconds=1.0, train_seconds=60.0, peak_memory_gib=2.0,
        perplexity_quantized=30.0, perplexity_final=12.0,
    )  # fmt: skip
    only = row(quantize_seconds=1.5, peak_memory_gib=1.0, perplexity_quantized=29.0)
    seconds = plot_cost([trained, only], AXES["seconds"]).axes[0].get_lines()
    assert seconds[0].get_xydata().tolist() == [[1.0, 30.0], [1.5, 29.0]]
    assert seconds[1].get_xydata().tolist() == [[61.0, 12.0]]
    memory = plot_cost([trained, only], AXES["memory"]).axes[0].get_lines()
    assert memory[0].get_xydata().tolist() == [[1.0, 29.0]]
    assert memory[1].get_xydata().tolist() == [[2.0, 12.0]]


def test_full_precision_is_one_line_for_one_model():
    rows = [
        row(str(n), bits_per_weight=n, perplexity_quantized=10.0 ** (5 - n),
            perplexity_full_precision=9.1975)
        for n in (1, 2, 4)
    ]  # fmt: skip
    axes = plot_cost(rows, AXES["bits"]).axes[0]
    assert sum(line.get_linestyle() == "--" for line in axes.get_lines()) == 1
    assert axes.get_yscale() == "log"
    assert axes.get_legend().get_title().get_text() == "labels: nbits"


def test_labels_are_not_parsed_as_math_and_are_truncated():
    hostile = r"$\frac{$" + "x" * 200
    figure = plot_cost([row(hostile, bits_per_weight=2.5, perplexity_quantized=30.0)], AXES["bits"])
    assert len(figure.axes[0].texts[0].get_text()) == 28
    image = io.BytesIO()
    figure.savefig(image, format="png")
    assert matplotlib.image.imread(io.BytesIO(image.getvalue())).std() > 0.01


def test_labels_cover_neither_points_nor_each_other():
    """Without room a label is left out; a sweep of few jobs shows all labels of its front."""
    few = [
        row(f"{n} · 64", bits_per_weight=n + 0.5, perplexity_quantized=9 + 2000 / n**3,
            perplexity_full_precision=8.0)
        for n in (1, 2, 3, 4)
    ]  # fmt: skip
    figure = plot_cost(few, AXES["bits"])
    assert_no_overlap(figure)
    assert {text.get_text() for text in figure.axes[0].texts} == {f"{n} · 64" for n in (1, 2, 3, 4)}
    (line,) = (line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--")
    y = figure.axes[0].transData.transform((1, line.get_ydata()[0]))[1]
    for text in figure.axes[0].texts:
        assert not text.get_window_extent().y0 < y < text.get_window_extent().y1
    many = [
        row(f"learning rate {n}", bits_per_weight=2 + n / 1000, perplexity_quantized=20 - n / 100)
        for n in range(80)
    ]
    figure = plot_cost(many, AXES["bits"])
    assert_no_overlap(figure)
    assert 0 < len(figure.axes[0].texts) < 40


def test_an_axis_is_logarithmic_where_the_range_asks_for_it():
    rows = [row(str(s), quantize_seconds=float(s), perplexity_quantized=30.0) for s in (1, 4, 90)]
    axes = plot_cost(rows, AXES["seconds"]).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
