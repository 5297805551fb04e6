"""The common style of plots: no pyplot, and files that are complete or absent."""

import subprocess
import sys

import matplotlib.image
import pytest

from hqqtrain.report.style import COLORS, MUTED, new_figure, save_figure


def test_a_single_plot_has_one_pair_of_axes_of_the_given_size():
    figure, axes = new_figure(5.0, 3.0)
    assert figure.axes == [axes]
    assert tuple(figure.get_size_inches()) == (5.0, 3.0)
    visible = {side for side, spine in axes.spines.items() if spine.get_visible()}
    assert visible == {"bottom"}


def test_a_grid_has_two_dimensions_even_with_one_panel():
    for rows, columns in ((1, 1), (3, 2)):
        figure, grid = new_figure(5.0, 3.0, rows, columns, sharey=True)
        assert grid.shape == (rows, columns)
        assert len(figure.axes) == rows * columns
        assert not any(axes.spines["left"].get_visible() for axes in grid.flat)


def test_a_saved_figure_is_a_png_of_its_size(tmp_path):
    figure, axes = new_figure(2.0, 1.0)
    axes.plot([0, 1], color=COLORS["trained"])
    path = save_figure(figure, tmp_path / "a.png", dpi=50)
    assert path == tmp_path / "a.png"
    assert matplotlib.image.imread(path).shape == (50, 100, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    figure, axes = new_figure(2.0, 1.0)
    axes.set_title("$\\broken$")
    with pytest.raises(ValueError, match="broken"):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_the_models_have_different_colors():
    assert len(set(COLORS.values())) == len(COLORS) == 3
    assert COLORS["full precision"] == MUTED


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    code = (
        "import sys; import hqqtrain.report.run_report, hqqtrain.report.style as style\n"
        "assert 'matplotlib' not in sys.modules; style.new_figure(1, 1)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
