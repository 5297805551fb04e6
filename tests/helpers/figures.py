"""Checks of figures."""


def assert_no_overlap(figure) -> None:
    """Assert that no visible tick labels, titles, axis labels or values of `figure` overlap.

    None of them may be cut at the edge of the figure either.
    """
    figure.draw_without_rendering()
    texts = []
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
        if axes.get_legend():
            texts += [*axes.get_legend().get_texts(), axes.get_legend().get_title()]
        for axis, limits, dim in (
            (axes.xaxis, sorted(axes.get_xlim()), 0),
            (axes.yaxis, sorted(axes.get_ylim()), 1),
        ):
            labels = [t for t in axis.get_majorticklabels() if t.get_visible()]
            texts += [text for text in labels if limits[0] <= text.get_position()[dim] <= limits[1]]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if t and t.get_text()]
    assert len(boxes) > 3
    edge = figure.bbox.padded(1)
    for index, (first, box) in enumerate(boxes):
        assert edge.x0 <= box.x0 < box.x1 <= edge.x1, first
        assert edge.y0 <= box.y0 < box.y1 <= edge.y1, first
        for second, second_box in boxes[:index]:
            assert not box.overlaps(second_box), (first, second)
