"""Make the corpus of `pretrain_tiny.py`: Python sources of this machine that may be trained on.

These are the standard library (PSF license) and the installed packages whose metadata names a
permissive license. Held-out modules and copies of them are left out, because the models are
evaluated on them.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hqqtrain.data.stdlib import is_held_out, stdlib_texts

EOS = "<|endoftext|>"
WINDOW = 5
"""A file that shares this many consecutive lines with a held-out module is excluded."""

PERMISSIVE = ("Apache", "BSD", "MIT", "ISC", "PSF", "Python Software Foundation", "Unlicense")
"""Licenses of packages that are trained on; all of them allow copies and derived works."""


def windows(text: str) -> Iterator[int]:
    """Yield a hash of every WINDOW consecutive non-blank lines, with white space stripped."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - WINDOW + 1):
        yield hash(tuple(lines[start : start + WINDOW]))


def permissive_license(package: Distribution) -> str | None:
    """Return the permissive license that the metadata of a package names, if any.

    A license file or a license text in the metadata is not read, and GPL beside another license
    excludes the package.
    """
    fields = package.metadata
    short = [*(fields.get_all("License-Expression") or []), *(fields.get_all("License") or [])]
    names = [name for name in short if "\n" not in name]
    names += [c for c in fields.get_all("Classifier") or [] if c.startswith("License ::")]
    named = " ".join(names)
    if "GPL" in named or "General Public" in named:
        return None
    return next((name for name in PERMISSIVE if re.search(rf"\b{name}", named)), None)


def package_sources(limit: int, licenses: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of the source files of installed packages below `limit` bytes.

    Args:
        limit: Upper limit of the size of a file.
        licenses: Gets the number of files yielded under each license.
    """
    for package in sorted(distributions(), key=lambda package: str(package.metadata["Name"])):
        license_name = permissive_license(package)
        for file in sorted(package.files or []) if license_name else []:
            path = Path(str(file.locate()))
            if path.suffix == ".py" and path.is_file() and 200 < path.stat().st_size < limit:
                licenses[str(license_name)] += 1
                text = path.read_text(encoding="utf-8", errors="ignore")
                yield ".".join(file.with_suffix("").parts), text


def clean_corpus(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Return the texts without duplicates, and without copies of held-out modules.

    A copy has the name of a held-out module or shares WINDOW consecutive lines with one.
    """
    held_out = {w for _, text in stdlib_texts("held_out") for w in windows(text)}
    seen: set[int] = set()
    kept = []
    for name, text in sources:
        last_part = name.removesuffix(".__init__").split(".")[-1]
        if is_held_out(last_part) and last_part in sys.stdlib_module_names:
            continue
        if hash(text) in seen or not held_out.isdisjoint(windows(text)):
            continue
        seen.add(hash(text))
        kept.append(text)
    return kept


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that can merge runs of spaces, as code has them.

    `<|endoftext|>` is token 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return all texts as one uint16 stream of tokens, with `<|endoftext|>` after each text."""
    encodings = tokenizer.encode_batch_fast(texts)
    return np.concatenate(
        [np.zeros(0, np.uint16), *(np.array([*e.ids, 0], np.uint16) for e in encodings)]
    )


def build_corpus(
    vocabulary: int,
    library_repeats: int,
    package_characters: float,
    file_limit: int,
    licenses: Counter[str],
) -> tuple[Tokenizer, np.ndarray]:
    """Return a tokenizer and the tokens of the corpus.

    Args:
        vocabulary: Number of tokens of the tokenizer.
        library_repeats: How often the corpus has the standard library.
        package_characters: Most characters of installed packages, which are a random sample.
        file_limit: Upper limit of the size of a file of a package, in bytes.
        licenses: Gets the number of files of packages under each license.
    """
    library = clean_corpus(stdlib_texts("train"))
    packages = clean_corpus(package_sources(file_limit, licenses))
    np.random.default_rng(0).shuffle(packages)
    share = package_characters / max(1, sum(map(len, packages)))
    packages = packages[: int(len(packages) * min(1, share))]
    sample = packages[:: max(1, len(packages) // 4000)]
    tokenizer = train_tokenizer(library + sample, vocabulary)
    library_tokens, package_tokens = encode(tokenizer, library), encode(tokenizer, packages)
    stream = np.concatenate([np.tile(library_tokens, library_repeats), package_tokens])
    print(f"{len(library)} + {len(packages)} files, {len(stream) / 1e6:.1f} M tokens", flush=True)
    return tokenizer, stream
