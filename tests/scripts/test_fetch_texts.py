"""scripts/fetch_texts.py turns pages into text, and splits by file."""

import json

import fetch_texts
from fetch_texts import page_text, write_source

from hqqtrain.data.stdlib import is_held_out

PAGE = """<html><head><title>hidden</title></head><body>
<div id="banner"><a><span class="text">Download</span></a></div>
<ul class="docnav"><li class="previous"><a>Prev</a></li></ul>
<h2>5.1. <span>A  title</span></h2>
<p>One <code>dpkg</code>
   paragraph &amp; more.<br/>Its second line.</p><p>Two.</p>
<ul><li>first</li><li><p>second</p></li></ul>
<pre class="screen">$ ls  -l
  indented

$ exit
</pre>last words</body></html>"""


def test_text_of_a_page():
    assert page_text(PAGE) == (
        "5.1. A title\n\nOne dpkg paragraph & more.\nIts second line.\n\nTwo.\n\n"
        "first\nsecond\n\n$ ls  -l\n  indented\n\n$ exit\n\nlast words\n"
    )


def test_no_file_is_in_both_splits_and_nothing_is_lost(tmp_path, capsys):
    texts = {f"page{index}": f"text {index} \u201cquoted\u201d\n" for index in range(50)}
    write_source(tmp_path / "prose", texts.items(), "a license")
    read = {}
    for split in ("train", "test"):
        lines = (tmp_path / "prose" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read[split] = {row["name"]: row["text"] for row in map(json.loads, lines)}
    assert read["train"] | read["test"] == texts
    assert set(read["test"]) == {name for name in texts if is_held_out(name)} != set()
    assert (tmp_path / "prose" / "LICENSE").read_text() == "a license"
    assert "train.jsonl: " in capsys.readouterr().out


def test_english_pages_with_prose_only(tmp_path):
    folder = tmp_path / fetch_texts.PAGES
    folder.mkdir(parents=True)
    for name in ("sect.apt", "index", "ix01"):
        (folder / f"{name}.html").write_text(f"<p>{name}</p>")
    french = folder.parent / "fr-FR"
    french.mkdir()
    (french / "sect.dpkg.html").write_text("<p>bonjour</p>")
    assert list(fetch_texts.handbook_texts(tmp_path)) == [("sect.apt", "sect.apt\n")]
