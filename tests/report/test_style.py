"""The common style of plots: no pyplot, and SVG that is small, deterministic and responsive."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.image
import pytest

from hqqtrain.report.style import (
    COLORS,
    MUTED,
    new_figure,
    plot_label,
    render_svg,
    save_figure,
    scale_axis,
)

HOSTILE = "</text></svg><script>alert(1)</script>]]>--><!--$x_1$&\x00\ud800"


def curve(label: str = "loss"):
    figure, axes = new_figure((4.0, 3.0))
    axes.plot(range(300), color=COLORS["trained"])
    axes.set_xlabel(plot_label(label, 200), parse_math=False)
    return figure


def test_a_figure_has_one_pair_of_axes_of_the_given_size():
    figure, axes = new_figure((5.0, 3.0))
    assert figure.axes == [axes]
    assert tuple(figure.get_size_inches()) == (5.0, 3.0)
    visible = {side for side, spine in axes.spines.items() if spine.get_visible()}
    assert visible == {"bottom"}


def test_an_svg_scales_with_its_place_and_takes_the_colors_of_the_page():
    root = ElementTree.fromstring(render_svg(curve(), "loss"))
    assert root.get("viewBox") == "0 0 288 216"
    assert root.get("width") is root.get("height") is None
    texts = [e for e in root.iter() if e.tag.endswith("}text")]
    assert "loss" in [e.text for e in texts]
    assert all(f"fill: var(--muted, {MUTED})" in e.get("style", "") for e in texts)
    sizes = [float(re.search(r"font-size: ([\d.]+)px", e.get("style"))[1]) for e in texts]
    assert min(sizes) >= 9


def test_an_svg_is_small_deterministic_and_has_nothing_that_concerns_the_rest_of_the_page():
    first, second = (render_svg(curve(), "loss") for _ in range(2))
    assert first == second
    assert len(first) < 12_000
    assert not re.search(r"<style|<metadata|<!--|font-family:|\d{4}-\d\d-\d\dT", first)
    ids = [set(re.findall(r' id="([^"]+)"', render_svg(curve(), name))) for name in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1], "two plots of a page must not share the name of a part"


def test_hostile_text_stays_text():
    svg = render_svg(curve(HOSTILE), "loss")
    root = ElementTree.fromstring(svg)
    assert "<script" not in svg
    assert any("<script>alert(1)</script>]]>--><!--$x_1$&��" in (e.text or "") for e in root.iter())
    assert plot_label("a\nb " + "x" * 90, 10) == "…xxxxxxxxx"


@pytest.mark.parametrize(
    ("values", "scale", "shown"),
    [
        ([8.2, 60.0, 300.0], "log", {"10", "20", "50", "100", "200"}),
        ([20.0, 1900.0], "log", {"20", "50", "100", "200", "500", "1,000"}),
        ([9.0, 1e6], "log", {"10", "100", "1,000", "10,000", "100,000", "1e+06"}),
        ([9.0, 60.0], "linear", {"20", "40", "60"}),
        ([0.0, 60.0], "linear", {"0", "20"}),
        ([], "linear", set()),
    ],
)
def test_an_axis_is_logarithmic_where_the_range_asks_for_it(values, scale, shown):
    figure, axes = new_figure()
    axes.plot(values, values)
    scale_axis(axes, "y", values)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    labels = [t for t in axis_labels(axes) if low <= t.get_position()[1] <= high]
    assert axes.get_yscale() == scale
    assert shown <= {label.get_text() for label in labels}


def axis_labels(axes):
    return [*axes.yaxis.get_majorticklabels(), *axes.yaxis.get_minorticklabels()]


def test_a_png_is_for_trackers(tmp_path):
    path = save_figure(curve(), tmp_path / "a.png")
    assert path == tmp_path / "a.png"
    assert matplotlib.image.imread(path).shape == (480, 640, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    figure, axes = new_figure((2.0, 1.0))
    axes.set_title("$\\broken$")
    with pytest.raises(ValueError, match="broken"):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_models_have_different_colors():
    assert len(set(COLORS.values())) == len(COLORS) == 3
    assert COLORS["full precision"] == MUTED


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    code = (
        "import sys; import hqqtrain.report.run_report, hqqtrain.report.style as style\n"
        "assert 'matplotlib' not in sys.modules; style.new_figure((1, 1))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
