"""Write English prose and Python code as JSON Lines, split into training and test texts by file.

    python scripts/fetch_texts.py texts

Solvers that see activations must be measured on text of another source than they were calibrated
on. This script makes two sources that any Debian or Ubuntu machine can have:

- `texts/prose`: the English Debian Administrator's Handbook, from the Debian package
  `debian-handbook` (apt-get downloads it, nothing is installed). Its license is GPL-2+ or
  CC-BY-SA-3.0.
- `texts/code`: the modules of the standard library of this Python, under the PSF license.

Each folder has `train.jsonl`, `test.jsonl`, whose rows have the columns `name` and `text`, and
`LICENSE`. A hash of the name of a file decides its split, so no file is in both, and every machine
has the same split. The modules of `code/test.jsonl` are those that `data.source=python_stdlib`
holds out. Hence `data.source=texts/prose` trains on one part and evaluates on the other.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hqqtrain.data.stdlib import is_held_out, stdlib_texts

PACKAGE = "debian-handbook"
PAGES = "usr/share/doc/debian-handbook/html/en-US"
COPYRIGHT = "usr/share/doc/debian-handbook/copyright"
NOT_PROSE = frozenset({"index", "ix01"})
"""Pages that have no text of their own: the table of contents and the index of terms."""

BLOCKS = frozenset(
    {"p", "pre", "li", "dt", "dd", "td", "th", "tr", "div", "br"} | {f"h{n}" for n in range(1, 7)}
)
"""HTML elements that begin and end a line."""

VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})
"""HTML elements without an end."""


class PageText(HTMLParser):
    """Collects the text of a page of DocBook HTML, without its navigation.

    White space is collapsed as a browser does, except in `pre`. Each block becomes a line, and
    paragraphs, headings and listings are followed by a blank one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._line = ""
        self._hidden = self._preformatted = 0

    @staticmethod
    def _is_hidden(tag: str, attributes: dict[str, str | None]) -> bool:
        classes = set((attributes.get("class") or "").split())
        return (
            tag in {"head", "script", "style"}
            or attributes.get("id") == "banner"
            or bool(classes & {"docnav", "toc", "indexterm"})
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        if tag in BLOCKS and not self._hidden:
            self._end_line(blank=False)
        if tag in VOID:
            return
        if self._hidden or self._is_hidden(tag, dict(attrs)):
            self._hidden += 1
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """End an element."""
        if tag in VOID:
            return
        if self._hidden:
            self._hidden -= 1
        elif tag in BLOCKS:
            self._end_line(blank=tag[0] in "hp")
        self._preformatted -= tag == "pre"

    def handle_data(self, data: str) -> None:
        """Add text, unless it is hidden."""
        if not self._hidden:
            self._line += data if self._preformatted else re.sub(r"\s+", " ", data)

    def _end_line(self, blank: bool) -> None:
        line = self._line.strip("\n") if self._preformatted else self._line.strip()
        self._line = ""
        if line.strip():
            self.lines.append(line)
        if blank and self.lines and self.lines[-1]:
            self.lines.append("")


def page_text(html: str) -> str:
    """Return the text of a page, one paragraph a line."""
    page = PageText()
    page.feed(html)
    page.close()
    page.handle_endtag("p")  # what follows the last block
    return "\n".join(page.lines).replace("\N{NO-BREAK SPACE}", " ").strip() + "\n"


def fetch_handbook(folder: Path) -> Path:
    """Download the package and unpack it in `folder`, which is returned."""
    try:
        subprocess.run(["apt-get", "download", "-qq", PACKAGE], cwd=folder, check=True)
        (package,) = folder.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"apt-get could not fetch {PACKAGE} ({error}). The script needs Debian or Ubuntu, "
            "and maybe `apt-get update` first."
        )
    return folder


def handbook_texts(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the English pages of the package unpacked in `root`."""
    for path in sorted((root / PAGES).glob("*.html")):
        if path.stem not in NOT_PROSE:
            yield path.stem, page_text(path.read_text(encoding="utf-8"))


def write_source(folder: Path, texts: Iterable[tuple[str, str]], license_text: str) -> None:
    """Write `train.jsonl`, `test.jsonl` and `LICENSE` in `folder`, and print their sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for name, text in texts:
        rows["test" if is_held_out(name) else "train"].append({"name": name, "text": text})
    for split, members in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in members]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        characters = sum(len(row["text"]) for row in members)
        print(f"{folder / split}.jsonl: {len(members)} files, {characters:,} characters")
    (folder / "LICENSE").write_text(license_text, encoding="utf-8")


def main() -> None:
    """Write both sources."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write prose/ and code/")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        root = fetch_handbook(Path(temporary))
        license_text = (root / COPYRIGHT).read_text(encoding="utf-8")
        write_source(folder / "prose", handbook_texts(root), license_text)
    terms = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    python_license = f"The standard library of Python {platform.python_version()}.\n\n"
    python_license += terms.read_text() if terms.is_file() else "PSF License Agreement\n"
    code = [*stdlib_texts("train"), *stdlib_texts("held_out")]
    write_source(folder / "code", code, python_license)


if __name__ == "__main__":
    main()
