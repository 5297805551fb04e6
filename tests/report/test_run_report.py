"""The report: one page of whatever the run has written, which fetches and runs nothing."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from hqqtrain.report.run_report import key_numbers, measured_perplexities, write_report
from hqqtrain.report.samples import Sample
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import Status
from hqqtrain.tracking.jsonl import JsonlTracker

HOSTILE = "</pre><script>alert('1')</script><img src=x onerror=alert(2)>]]>\x00\ud800\u202e$x_1$"
SUMMARY = {
    "schema": 1,
    "run": {"name": "a<b>&c", "recipe": "tiny_2bit", "task": "finetune", "world_size": 2,
            "versions": {"torch": "2.13.0"}},
    "quantize": {"bits_per_weight": 2.5, "relative_error": 0.11, "weights": 4718592},
    "eval": {"tokens": 9, "dataset": "held-out", "protocol": "hqq",
             "context": 1024, "stride": 512, "full_precision": {"perplexity": 8.0},
             "quantized": {"perplexity": 16.0, "kl": 0.6, "top1_agreement": 0.5},
             "final": {"perplexity": 10.0}},
    "train": {"steps": 3, "loss": 2.3},
}  # fmt: skip
CONFIG = {
    "recipe": "tiny_2bit",
    "train": {"max_steps": 400, "packing": True, "epochs": None},
    "optim": {"lr": 0.002, "name": "adamw"},
    "quant": {"skip": ["lm_head", "a*"], "overrides": {"*.q_proj": {"nbits": 4}}},
    "launch": {"nodes": 1},
    "command": ["python", "-m", "hqqtrain", "data.source=my file"],
    "git_revision": "0123abcd",
}
PLOTS = [
    "grad_norm",
    "layers",
    "learning_rate",
    "loss",
    "peak_gib",
    "perplexity",
    "tokens_per_second",
]


def write_run(folder: Path, status: str = "done", kind: str = "self_attn.q_proj", **keys) -> Path:
    """Write the files of a run of 200 steps, and return its folder."""
    layout = RunLayout(folder)
    tracker = JsonlTracker(layout.metrics_jsonl)
    tracker.start({})
    errors = {f"quant/relative_error/model.layers.{i}.{kind}": 0.1 + i / 100 for i in range(6)}
    tracker.log(errors | {"eval/loss": 3.0}, 0)
    for step in range(1, 200):
        metrics = {"train/loss": 3.0 / step, "train/grad_norm": 1.0, "train/learning_rate": 1e-3}
        tracker.log(metrics | {"train/tokens_per_second": 9.0, "memory/peak_gib": 1.0}, step)
    tracker.log({"train/loss": float("nan")}, 200)
    tracker.finish(0)
    layout.config_yaml.write_text(yaml.safe_dump(CONFIG))
    layout.status_json.write_text(json.dumps({"status": status, **keys}))
    return folder


class Page(HTMLParser):
    """Collects the open tags, what a browser would fetch or run, and the words it shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.fetched, self.handlers, self.tags, self.words = [], [], [], set(), ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.handlers += [k for k, _ in attributes if k.startswith("on")]
        if tag not in ("meta", "img", "link", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data + " "

    def assert_harmless(self) -> None:
        """Assert that the page is well-formed, fetches nothing and runs nothing."""
        assert self.open == []
        assert not self.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
        assert self.handlers == []
        assert all(source.startswith(("#", "data:image/png;base64,")) for source in self.fetched)


def test_the_whole_report(tmp_path):
    files = write_report(write_run(tmp_path), SUMMARY)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(
        ["index.html", *(f"{name}.svg" for name in PLOTS)]
    )
    assert sorted(files) == sorted([*PLOTS, "index"])
    page = Page(files["index"])
    page.assert_harmless()
    for words in (
        "a<b>&c", "4,718,592", "75%", "model.layers.5.self_attn.q_proj", "2 processes", "done",
        "eval.protocol=hqq, context 1,024, stride 512",
        "Learning rate", "Gradient norm", "Tokens per second", "Peak memory (GiB)", "0.002",
        "adamw", "lm_head, a*", "overrides.*.q_proj.nbits", "true", "'data.source=my file'",
        "0123abcd",
    ):  # fmt: skip
        assert words in page.words, words
    assert "epochs" not in page.words


def test_a_report_is_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").mkdir()
    run = write_run(tmp_path / "run")
    (run / "report").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="is a symbolic link"):
        write_report(run, SUMMARY)
    (run / "report").unlink()
    (run / "report").mkdir()
    (tmp_path / "victim" / "page").write_text("mine")
    (run / "report" / "index.html").symlink_to(tmp_path / "victim" / "page")
    write_report(run, SUMMARY)
    assert (tmp_path / "victim" / "page").read_text() == "mine"
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["page"]


def test_the_same_run_has_the_same_plots(tmp_path):
    first, second = (
        write_report(write_run(tmp_path / name), SUMMARY) for name in ("first", "second")
    )
    for name in PLOTS:
        assert first[name].read_bytes() == second[name].read_bytes()
    assert sum(path.stat().st_size for path in first.values()) < 200_000


def test_images_for_trackers_are_written_on_demand(tmp_path):
    files = write_report(write_run(tmp_path), SUMMARY, images=True)
    images = {name: path for name, path in files.items() if path.suffix == ".png"}
    assert sorted(images) == ["layers.png", "loss.png", "perplexity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in images.values())


def test_parts_that_were_not_run_are_omitted(tmp_path):
    only = {"run": {"name": "x"}, "eval": {"final": {"perplexity": 3.0}}}
    files = write_report(tmp_path / "a", only)
    assert set(files) == {"perplexity", "index"}
    files = write_report(tmp_path / "b", {})
    assert set(files) == {"index"}
    Page(files["index"]).assert_harmless()


@pytest.mark.parametrize(
    ("status", "shown", "refreshes"),
    [
        ({"status": "running"}, "running · step 200 of 400", True),
        ({"status": "failed", "exit_code": 2, "cause": "UserError: a\nb <x>"},
         "failed with exit code 2 · step 200 of 400", False),
        ({"status": "preempted", "exit_code": 3, "cause": "PreemptedError: SIGTERM"},
         "preempted; the same command resumes it · step 200 of 400", False),
        ({"status": "done", "exit_code": 0, "cause": ""}, "done · 2", False),
    ],
)  # fmt: skip
def test_the_page_says_how_the_run_has_ended(tmp_path, status, shown, refreshes):
    page = Page(write_report(write_run(tmp_path, **status), {})["index"])
    assert shown in page.words
    assert status.get("cause", "") in page.words
    assert ("refresh" in (tmp_path / "report/index.html").read_text()) is refreshes


def test_a_status_that_is_not_written_yet_can_be_given(tmp_path):
    page = Page(write_report(write_run(tmp_path, "running"), {}, status=Status("done"))["index"])
    assert "done · 2" in page.words


def test_samples_are_shown_side_by_side(tmp_path):
    sample = Sample("def f(x):", {"quantized": " x x x", "trained": " return x <b>"})
    page = Page(write_report(tmp_path, {}, samples=[sample])["index"])
    page.assert_harmless()
    assert "def f(x):" in page.words
    assert "trained  return x <b>" in page.words


def test_hostile_names_and_texts_do_no_harm(tmp_path):
    folder = write_run(tmp_path, "failed", cause=HOSTILE, kind=HOSTILE.replace("/", "."))
    settings = {HOSTILE: HOSTILE.replace("\ud800", "").replace("\x00", "")}
    RunLayout(folder).config_yaml.write_text(
        yaml.safe_dump(
            {"train": {"max_steps": HOSTILE[:20]}, "data": settings}, allow_unicode=True
        ).replace("\x00", "")
    )
    summary = json.loads(json.dumps(SUMMARY).replace("held-out", "x"))
    summary["run"] |= {"name": HOSTILE, "recipe": HOSTILE, "device": HOSTILE}
    summary["eval"]["dataset"] = HOSTILE
    files = write_report(folder, summary, samples=[Sample(HOSTILE, {HOSTILE: HOSTILE})])
    page = Page(files["index"])
    page.assert_harmless()
    assert page.words.count("alert('1')") > 8
    assert "<script" not in "".join(path.read_text(encoding="utf-8") for path in files.values())


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b'{"train/global_step": 1}\n\xff\n',
        b"[1]\n",
        b'{"train/global_step": "x"}\n{"train/global_step": 1}\n',
        b'{"train/global_step": 1, "train/loss": "x", "train/grad_norm": []}\n',
    ],
)
def test_damaged_files_of_a_run_leave_parts_out(tmp_path, content):
    write_run(tmp_path, "failed")
    layout = RunLayout(tmp_path)
    layout.metrics_jsonl.write_bytes(content)
    layout.config_yaml.write_text("- {")
    layout.status_json.write_text("{")
    Page(write_report(tmp_path, SUMMARY)["index"]).assert_harmless()


def test_key_numbers():
    figures = key_numbers(SUMMARY)
    assert figures["of the gap closed"] == "75%"
    assert figures["bits per weight"] == "2.5"
    assert figures["top-1 agreement, quantized"] == "50.0%"
    assert "top-1 agreement, trained" not in figures  # it was not measured
    assert key_numbers({"eval": {"final": {"kl": 0.5}}}) == {"KL, trained": "0.5000"}
    losses = [{"train/global_step": s, "eval/loss": abs(s - 20) + 1} for s in (0, 10, 20, 30)]
    assert key_numbers({}, losses) == {"step with the lowest held-out loss": "20"}
    result = {"train": {"steps": 40, "best_step": 30, "adapter_step": 30}}
    assert key_numbers(result, losses) == {
        "step with the lowest held-out loss, which is the result": "30"
    }
    result["train"]["adapter_step"] = 40
    assert key_numbers(result, losses) == {"step with the lowest held-out loss": "30"}
    infinite = {"eval": {"quantized": {"perplexity": float("inf")}}}
    assert measured_perplexities(infinite) == {}
