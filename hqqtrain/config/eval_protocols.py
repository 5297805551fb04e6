"""The ways to measure perplexity on a held-out text: which windows, and what they predict.

Perplexities can be compared only if they have the same protocol: more context makes them lower.
"""

from dataclasses import dataclass

WINDOWS = "windows"
"""The protocol that samples windows of `train.max_seq_len` tokens, each from a single text."""


@dataclass(frozen=True)
class JoinedProtocol:
    """How the join of all held-out texts becomes the windows that are measured.

    Attributes:
        context: Number of tokens in a full window.
        stride: Tokens from the end of one window to the end of the next one, which are the tokens
            that a window predicts.
        measures_rest: Whether the tokens after the last full stride are measured, too.
        keeps_eos: Whether an EOS that the tokenizer puts after the text is measured.
    """

    context: int
    stride: int
    measures_rest: bool
    keeps_eos: bool


JOINED_PROTOCOLS = {
    "wikitext2_2048": JoinedProtocol(2048, 2048, measures_rest=False, keeps_eos=True),
    "hqq": JoinedProtocol(1024, 512, measures_rest=True, keeps_eos=False),
}
"""The other values of `eval.protocol`; `hqqtrain/data/joined_text.py` names their sources."""
