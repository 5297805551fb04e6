"""Samples are shown side by side, and as text, whatever they contain."""

from hqqtrain.report.samples import Sample, render_samples


def test_every_continuation_has_its_source_as_a_title():
    page = render_samples([Sample("def f(x):", {"quantized": " x x", "trained": " return x"})])
    assert page.index("def f(x):") < page.index("quantized") < page.index(" x x")
    assert page.index(" x x") < page.index("trained") < page.index(" return x")


def test_markup_in_a_text_is_text():
    page = render_samples([Sample("</pre><script>", {"<b>": "&amp;<img src=x>"})])
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;b&gt;" in page
    assert "&amp;amp;" in page


def test_replies_of_chats_are_called_so():
    page = render_samples([Sample("Hi", {"trained": "Hello"}, is_chat=True)])
    assert "Replies to held-out chats" in page
    assert "Continuations of held-out text" in render_samples([Sample("a", {"trained": "b"})])


def test_no_samples_give_no_section():
    assert render_samples([]) == ""
