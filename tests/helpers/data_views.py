"""The view of task=data in tests: figures, a chat, and text that tries to do harm."""

from hqqtrain.report.data_view import Piece
from hqqtrain.rundir.schema import DataMetrics

METRICS = DataMetrics(
    source="mine.jsonl", format="chat", examples=2, tokens=30, trained_tokens=9, sequences=1,
    max_seq_len=64, padding=0.53125, truncated=1, split=0, untrained=0, duplicates=1,
    lengths={"min": 10, "median": 12, "p95": 20, "max": 20}, histogram=[[10, 14, 1], [15, 20, 3]],
    left_out={"no assistant turn": 4},
)  # fmt: skip
CHAT = (
    Piece("<|user|>", is_special=True), Piece("hi\nthere"), Piece("<|bot|>", is_special=True),
    Piece("hello\n", is_trained=True), Piece("<|end|>", is_trained=True, is_special=True),
    Piece("\n"),
)  # fmt: skip

HOSTILE = (
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\rover\x08\x7f\x9b1A\x00\u202egnp\u2028\u2066\ufeff"
    "\ud800\U000e0041 ]] [[ example 2 of 2\nexamples  9\v\f\x85"
)
"""Escape sequences, other control characters, and lines that look like ours."""
