"""The quantization errors by layer: a heat map that is right and readable for any model."""

import math

import pytest
from figures import assert_no_overlap

from hqqtrain.report.layers import group_by_kind, plot_layer_errors

KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def errors(layers: int) -> dict[str, float]:
    return {
        f"model.layers.{i}.{kind}": 0.1 + i / 1000 + k / 100
        for i in range(layers)
        for k, kind in enumerate(KINDS)
    }


def heat_map(figure):
    """Return (names of the rows, values of the cells)."""
    (image,) = figure.axes[0].get_images()
    return [t.get_text() for t in figure.axes[0].get_yticklabels()], image.get_array()


@pytest.mark.parametrize("layers", [2, 6, 80, 140])
def test_a_cell_is_a_layer_and_a_kind(layers):
    figure = plot_layer_errors(errors(layers))
    assert_no_overlap(figure)
    names, cells = heat_map(figure)
    assert names == KINDS
    assert cells.shape == (4, layers)
    assert cells[2, 1] == pytest.approx(0.121)
    assert cells[3, layers - 1] == pytest.approx(0.13 + (layers - 1) / 1000)


def test_a_kind_that_only_some_layers_have_leaves_cells_empty():
    hybrid = errors(6) | {"model.layers.5.mixer.in_proj": 0.2, "lm_head": 0.3}
    names, cells = heat_map(plot_layer_errors(hybrid))
    assert names == [*KINDS, "mixer.in_proj", "lm_head"]
    assert [math.isnan(value) for value in cells.filled(math.nan)[4]] == [True] * 5 + [False]


def test_errors_of_different_magnitudes_are_on_a_logarithmic_scale():
    def norm(values):
        return type(plot_layer_errors(values).axes[0].get_images()[0].norm).__name__

    assert norm(errors(6)) == "Normalize"
    assert norm(errors(6) | {"model.layers.0.mlp.up_proj": 1e-4}) == "LogNorm"
    assert norm(errors(6) | {"model.layers.0.mlp.up_proj": 0.0}) == "Normalize"


def test_experts_are_averaged():
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.up_proj": i + e for i in range(3) for e in range(64)
    }
    figure = plot_layer_errors(errors(3) | experts)
    assert_no_overlap(figure)
    names, cells = heat_map(figure)
    assert names[-1] == "mlp.experts.*.up_proj"
    assert cells[4].tolist() == [31.5, 32.5, 33.5]


def test_stacks_of_layers_are_kept_apart():
    stacks = {
        f"model.{s}.layers.{i}.fc1": v
        for s, v in (("encoder", 1.0), ("decoder", 2.0))
        for i in (0, 1)
    }
    assert group_by_kind(stacks) == {
        "model.encoder.layers.*.fc1": {0: 1.0, 1: 1.0},
        "model.decoder.layers.*.fc1": {0: 2.0, 1: 2.0},
    }


def test_kinds_of_modules():
    names = {"model.layers.10.mlp.up": 1.0, "model.layers.2.mlp.up": 2.0, "head": 3.0}
    assert group_by_kind(names) == {"mlp.up": {10: 1.0, 2: 2.0}, "head": {0: 3.0}}


def test_names_without_layers_are_listed_largest_first():
    named = {f"block_{chr(97 + i // 26)}{chr(97 + i % 26)}.proj": i / 60 for i in range(60)}
    figure = plot_layer_errors(named)
    assert_no_overlap(figure)
    assert "24 largest of 60" in figure.axes[0].get_xlabel()
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "block_ch.proj"
    assert plot_layer_errors({}) is None


def test_names_are_not_parsed_as_math_and_long_ones_are_cut():
    hostile = {f"model.layers.{i}.{'x' * 200}$\\frac{{$<b>": 0.1 * (i + 1) for i in range(3)}
    figure = plot_layer_errors(hostile)
    figure.draw_without_rendering()
    (name,) = heat_map(figure)[0]
    assert name == "…" + ("x" * 200 + "$\\frac{$<b>")[-29:]
