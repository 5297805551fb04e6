"""Measure how fast data become tokens in files, and how much memory that takes.

    python scripts/measure_tokenization.py --tokens 2e7

The script writes a corpus of random lines of the standard library, as plain text and as chats, each
with about the given number of tokens. It turns both into files of packed sequences, as a run does,
and prints the tokens per second beside those of the tokenizer alone, on the same text and with the
same threads. Memory is the largest anonymous memory of the process (RssAnon): pages of mapped files
do not count, because the kernel can drop them at any time. Workers are measured together.
"""

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from tabulate import tabulate
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hqqtrain.common.threads import usable_cores
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.packing import EXAMPLES, PACKED, pack_examples
from hqqtrain.data.sources import load_training_texts
from hqqtrain.data.stdlib import stdlib_texts
from hqqtrain.data.token_files import map_sequences, save_sequences
from hqqtrain.models.source import TINY_FOLDER

CHARACTERS_PER_TOKEN = 3.5
"""A first estimate, which only decides how much text is written."""

SAMPLE_TEXTS = 2000
"""Texts on which the tokenizer alone is measured."""


def write_corpus(file: Path, kind: str, tokens: int) -> None:
    """Write rows with about so many tokens, of `kind` `text` or `chat`, as JSON Lines."""
    draw = random.Random(0)
    lines = [line for _, text in stdlib_texts("train") for line in text.splitlines() if line]
    characters = 0.0

    def passage(mean: int) -> str:
        size = max(1, int(draw.expovariate(1 / mean)))
        first = draw.randrange(len(lines) - size)
        return "\n".join(lines[first : first + size])

    with file.open("w", encoding="utf-8") as out:
        while characters < tokens * CHARACTERS_PER_TOKEN:
            if kind == "text":
                row: dict = {"text": passage(60)}
                characters += len(row["text"])
            else:
                turns = [passage(8) for _ in range(2 * draw.randint(1, 4))]
                roles = ("user", "assistant")
                row = {
                    "messages": [
                        {"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)
                    ]
                }
                characters += sum(map(len, turns))
            out.write(json.dumps(row) + "\n")


def texts_of(file: Path, number: int) -> list[str]:
    """Return the text of the first rows of a corpus."""
    texts = []
    with file.open(encoding="utf-8") as rows:
        for row, _ in zip(rows, range(number), strict=False):
            content = json.loads(row)
            messages = content.get("messages", [])
            texts.append(content.get("text") or "\n".join(m["content"] for m in messages))
    return texts


def tokenizer_speed(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Return the tokens per second of the tokenizer alone, in batches as a run has them."""
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), 256):
        encoded = tokenizer(texts[first : first + 256], return_attention_mask=False, verbose=False)
        tokens += sum(map(len, encoded["input_ids"]))
    return tokens / (time.perf_counter() - start)


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Yield a dictionary that gets the largest memory in MiB: `own` and `workers`."""
    process, stop = psutil.Process(), threading.Event()
    peak = {"before": anonymous_mib(process), "own": 0.0, "workers": 0.0}

    def sample() -> None:
        while not stop.wait(0.1):
            peak["own"] = max(peak["own"], anonymous_mib(process))
            children = sum(map(anonymous_mib, process.children(recursive=True)))
            peak["workers"] = max(peak["workers"], children)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def anonymous_mib(process: psutil.Process) -> float:
    """Return the resident memory of a process without mapped files; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) / 1024 if found else 0.0


def measure(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Tokenize a corpus of one kind, and return a row of the table."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    corpus = folder / f"{kind}.jsonl"
    write_corpus(corpus, kind, int(options.tokens))
    alone = tokenizer_speed(tokenizer, texts_of(corpus, SAMPLE_TEXTS))
    data = DataConfig(
        source=str(corpus), chat_template=options.chat_template, workers=options.workers
    )
    store = folder / kind
    store.mkdir()
    with peak_memory() as peak:
        start = time.perf_counter()
        parts, packed, _ = pack_examples(
            load_training_texts(data, EvalConfig(source=None)),
            tokenizer, max_seq_len=options.max_seq_len, data=data,
            folder=store,
        )  # fmt: skip
        shares = packed.stream is not parts.stream
        save_sequences(store, {EXAMPLES: parts, **({PACKED: packed} if shares else {})})
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        mapped = map_sequences(store, PACKED if shares else EXAMPLES)
        check_seconds = time.perf_counter() - start
    tokens = len(parts.stream)
    corpus.unlink()
    return {
        "kind": kind,
        "tokens": f"{tokens:,}",
        "examples": f"{len(mapped.starts):,}",
        "tokens/s": f"{tokens / seconds:,.0f}",
        "tokenizer alone": f"{alone:,.0f}",
        "share": f"{tokens / seconds / alone:.0%}",
        "memory before, MiB": f"{peak['before']:,.0f}",
        "peak, MiB": f"{peak['own']:,.0f}",
        "workers, MiB": f"{peak['workers']:,.0f}",
        "reuse, s": f"{check_seconds:.2f}",
    }


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=2e7, help="tokens of each corpus")
    parser.add_argument("--kinds", nargs="+", default=["text", "chat"], choices=["text", "chat"])
    parser.add_argument("--model", default=str(TINY_FOLDER), help="folder of the tokenizer")
    parser.add_argument("--chat-template", default="chatml")
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--folder", help="where to write; a corpus of 1e9 tokens takes 15 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [measure(kind, options, Path(folder)) for kind in options.kinds]
    print(tabulate(rows, headers="keys", disable_numparse=True, stralign="right"))
    print(f"{options.workers} workers, {usable_cores()} usable cores")


if __name__ == "__main__":
    main()
