"""Packing: every token once, no attention between texts, and the labels that a model expects."""

import hashlib
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.data.layout import collate_batch
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sequences import IGNORE_INDEX

TINY = Path(hqqtrain.__file__).parent / "models" / "tiny"
TEXTS = [
    "def f(x):\n    return x\n",
    "import os\n" * 30,
    "",
    "   \n",
    "x = 1\n",
    "class A: pass\n" * 9,
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def expected_stream(tokenizer) -> list[list[int]]:
    return [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in TEXTS if t.strip()]


@pytest.mark.parametrize("length", [2, 7, 16, 1000])
def test_packed_sequences_contain_every_token_once(tokenizer, length):
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=length).sequences
    tokens = torch.cat([sequences[i]["input_ids"] for i in range(len(sequences))]).tolist()
    whole = list(chain.from_iterable(expected_stream(tokenizer)))
    assert tokens == whole[: len(tokens)]
    assert len(whole) - len(tokens) <= 1
    assert all(len(sequences[i]["input_ids"]) == length for i in range(len(sequences) - 1))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [2, 7, 16, 1000])
def test_tokens_counts_the_labels_and_labels_are_the_inputs(tokenizer, length, packing):
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=length, packing=packing).sequences
    labels = [row["labels"] for row in (sequences[i] for i in range(len(sequences)))]
    assert sequences.target_token_count == sum(int((row != IGNORE_INDEX).sum()) for row in labels)
    for row in (sequences[i] for i in range(len(sequences))):
        predicted = row["labels"] != IGNORE_INDEX
        assert torch.equal(row["labels"][predicted], row["input_ids"][predicted])
        assert torch.equal(predicted, row["position_ids"] > 0)


def test_positions_restart_with_every_text_and_every_sequence(tokenizer):
    lengths = [len(ids) for ids in expected_stream(tokenizer)]
    one = pack_examples(TEXTS, tokenizer, max_seq_len=10_000).sequences[0]["position_ids"]
    assert one.tolist() == [p for n in lengths for p in range(n)]
    cut = pack_examples(TEXTS, tokenizer, max_seq_len=9).sequences
    assert all(cut[i]["position_ids"][0] == 0 for i in range(len(cut)))


def test_without_packing_a_sequence_is_one_truncated_text(tokenizer):
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=12, packing=False).sequences
    expected = [ids[:12] for ids in expected_stream(tokenizer)]
    assert [sequences[i]["input_ids"].tolist() for i in range(len(sequences))] == expected


def test_tokens_that_are_no_targets_have_no_label(tokenizer):
    """A mask leaves out any token, such as those of a prompt, and the positions stay."""
    plain = pack_examples(TEXTS, tokenizer, max_seq_len=16).sequences
    masked = replace(plain, targets=plain.targets & (plain.stream % 2 == 0))
    for i in range(len(plain)):
        before, after = plain[i], masked[i]
        even = before["input_ids"] % 2 == 0
        assert torch.equal(
            after["labels"], before["labels"].where(even, torch.tensor(IGNORE_INDEX))
        )
        assert torch.equal(after["position_ids"], before["position_ids"])
    counted = sum(int((masked[i]["labels"] != IGNORE_INDEX).sum()) for i in range(len(masked)))
    assert masked.target_token_count == counted < plain.target_token_count


def test_the_digest_of_plain_text_does_not_depend_on_targets(tokenizer):
    """Checkpoints of earlier versions have the digest of the other arrays alone."""
    plain = pack_examples(TEXTS, tokenizer, max_seq_len=16).sequences
    arrays = (plain.stream, plain.starts, plain.begin, plain.end)
    assert plain.digest == hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    masked = replace(plain, targets=np.zeros_like(plain.targets))
    assert masked.digest != plain.digest


def test_blank_texts_only_is_an_error(tokenizer):
    with pytest.raises(UserError, match="no text"):
        pack_examples(["", " \n"], tokenizer, max_seq_len=8)


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_has_the_same_logits_in_a_batch_and_alone(tokenizer, model, packing):
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=70, packing=packing).sequences
    rows = [sequences[i] for i in range(len(sequences))]
    batch = collate_batch(rows)
    assert len(rows) > 1
    assert len({len(row["labels"]) for row in rows}) > 1
    with torch.no_grad():
        raise_on_all_ranks = model(**batch, use_cache=False).logits
        for index, row in enumerate(rows):
            starts = torch.nonzero(row["position_ids"] == 0).flatten().tolist()
            for begin, end in pairwise([*starts, len(row["labels"])]):
                alone = model(row["input_ids"][None, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(
                    raise_on_all_ranks[index, begin:end], alone, rtol=1e-4, atol=1e-4
                )


def test_the_loss_of_a_batch_is_the_mean_over_tokens(tokenizer, model):
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=10_000).sequences
    batch = collate_batch([sequences[0]])
    total = 0.0
    with torch.no_grad():
        for ids in map(torch.tensor, expected_stream(tokenizer)):
            total += float(model(ids[None], labels=ids[None]).loss) * (len(ids) - 1)
        loss = float(model(**batch, use_cache=False).loss)
    assert loss == pytest.approx(total / sequences.target_token_count, rel=1e-5)


def test_select_keeps_the_sequences(tokenizer):
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=8).sequences
    some = sequences.select(np.array([2, 0]))
    assert len(some) == 2
    assert torch.equal(some[0]["input_ids"], sequences[2]["input_ids"])
    assert some.target_token_count == sum(int((sequences[i]["labels"] >= 0).sum()) for i in (0, 2))


def test_a_tokenizer_that_adds_its_own_eos_gets_no_second_one(tokenizer):
    class AddsEos:
        eos_token_id = 0

        def __call__(self, texts, **options):
            return {"input_ids": [[5, 6, 0] for _ in texts]}

    assert (
        pack_examples(["a", "b"], AddsEos(), max_seq_len=6).sequences[0]["input_ids"].tolist()
        == [5, 6, 0] * 2
    )
