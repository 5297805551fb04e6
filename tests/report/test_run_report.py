"""The report: real plots, one page that fetches nothing, and no parts that were not run."""

from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from hqqtrain.report.plots import group_by_kind, plot_layer_errors, plot_loss, plot_perplexities
from hqqtrain.report.run_report import key_numbers, measured_perplexities, write_report
from hqqtrain.tracking.jsonl import JsonlTracker

KINDS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
SUMMARY = {
    "schema": 1,
    "run": {"name": "a<b>&c", "recipe": "tiny_2bit", "task": "finetune", "world_size": 2,
            "versions": {"torch": "2.13.0"}},
    "quantize": {"bits_per_weight": 2.5, "relative_error": 0.11, "weights": 4718592},
    "eval": {"tokens": 9, "dataset": "held-out", "full_precision": {"perplexity": 8.0},
             "quantized": {"perplexity": 16.0, "kl": 0.6}, "final": {"perplexity": 10.0}},
    "train": {"steps": 3, "loss": 2.3},
}  # fmt: skip


def errors(layers: int) -> dict[str, float]:
    return {f"model.layers.{i}.{k}": 0.1 + i / 1000 for i in range(layers) for k in KINDS}


def metrics(path: Path) -> Path:
    tracker = JsonlTracker(path)
    tracker.start({})
    tracker.log({"eval/loss": 3.0}, 0)
    for step in range(1, 200):
        tracker.log({"train/loss": 3.0 / step}, step)
    tracker.log({"train/loss": float("nan")}, 200)
    tracker.finish(0)
    return path


class Page(HTMLParser):
    """Collects the open tags, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.fetched, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data + " "


def test_the_whole_report(tmp_path):
    files = write_report(tmp_path, metrics(tmp_path / "metrics.jsonl"), SUMMARY, errors(6))
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "index.html", "layers.png", "loss.png", "perplexity.png",
    ]  # fmt: skip
    assert set(files) == {"loss", "perplexity", "layers", "index"}
    for name in ("loss", "perplexity", "layers"):
        assert matplotlib.image.imread(files[name]).std() > 0.01
    page = Page(files["index"].read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.fetched) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    for words in ("a<b>&c", "4,718,592", "75%", "model.layers.5.mlp.down_proj", "2 processes"):
        assert words in page.words


def test_parts_that_were_not_run_are_omitted(tmp_path):
    only = {"run": {"name": "x"}, "eval": {"final": {"perplexity": 3.0}}}
    files = write_report(tmp_path, tmp_path / "none.jsonl", only, {})
    assert set(files) == {"perplexity", "index"}
    assert set(write_report(tmp_path / "b", tmp_path / "none", {}, {})) == {"index"}


def test_key_numbers():
    figures = key_numbers(SUMMARY)
    assert figures["of the gap closed"] == "75%"
    assert figures["bits per weight"] == "2.5"
    infinite = {"eval": {"quantized": {"perplexity": float("inf")}}}
    assert measured_perplexities(infinite) == {}


@pytest.mark.parametrize("layers", [6, 80, 140])
def test_labels_of_a_layer_plot_do_not_overlap(layers):
    figure = plot_layer_errors(errors(layers))
    assert_no_overlap(figure)
    bars = sum(len(axes.patches) for axes in figure.axes)
    assert bars == layers * len(KINDS)


def test_names_without_layers_are_listed_largest_first():
    named = {f"block_{chr(97 + i // 26)}{chr(97 + i % 26)}.proj": i / 60 for i in range(60)}
    figure = plot_layer_errors(named)
    assert_no_overlap(figure)
    assert "48 largest of 60" in figure.axes[0].get_xlabel()
    assert figure.axes[0].get_yticklabels()[-1].get_text() == "block_ch.proj"


def test_other_figures_do_not_overlap_either():
    assert_no_overlap(plot_perplexities({"full precision": 8.0, "quantized": 9e5, "trained": 9.0}))
    rows = [{"train/global_step": s, "train/loss": 3.0 - s / 1e5} for s in range(100_000)]
    assert_no_overlap(plot_loss(rows))
    assert plot_loss([{"train/global_step": 1, "eval/loss": 2.0}]) is None
    assert plot_loss([{"train/global_step": 1, "train/loss": 2.0}]) is not None


def test_kinds_of_modules():
    names = {"model.layers.10.mlp.up": 1.0, "model.layers.2.mlp.up": 2.0, "head": 3.0}
    assert group_by_kind(names) == {"mlp.up": {10: 1.0, 2: 2.0}, "head": {0: 3.0}}


def assert_no_overlap(figure) -> None:
    """Assert that no visible tick labels, titles, axis labels or values of `figure` overlap."""
    figure.draw_without_rendering()
    texts = [figure._supxlabel, figure._supylabel]
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        texts += [axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis, limits, dim in (
            (axes.xaxis, axes.get_xlim(), 0),
            (axes.yaxis, axes.get_ylim(), 1),
        ):
            labels = [t for t in axis.get_majorticklabels() if t.get_visible()]
            texts += [text for text in labels if limits[0] <= text.get_position()[dim] <= limits[1]]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if t and t.get_text()]
    assert len(boxes) > 3
    for index, (first, box) in enumerate(boxes):
        for second, second_box in boxes[:index]:
            assert not box.overlaps(second_box), (first, second)
