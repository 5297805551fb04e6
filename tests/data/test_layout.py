"""However texts are arranged, a model gets every text once, and as if it were alone."""

import pytest
import torch
import torch.nn.functional as F
from architectures import IN_ROWS, PACKED, SMALL, small_config, small_model
from packed_texts import MAX_SEQ_LEN, ROWS, make_loader, packed_sequences

from hqqtrain.data.layout import BatchLayout, collate_batch
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.evaluation.perplexity import evaluate_perplexity
from hqqtrain.models.build import build_meta
from hqqtrain.models.causal_lm import next_token_outputs
from hqqtrain.models.packing_probe import probe_packing
from hqqtrain.models.rope import reset_dynamic_rope


def targets(batches) -> list[int]:
    return sorted(int(t) for batch in batches for t in batch["labels"].flatten() if t >= 0)


@torch.no_grad()
def loss_alone(model, sequences: TokenSequences) -> float:
    """Return the sum of the losses of the texts in `sequences`, by transformers, one at a time."""
    total = 0.0
    for row in sequences:
        starts = torch.nonzero(row["position_ids"] == 0).flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], len(row["labels"])], strict=True):
            ids = row["input_ids"][None, begin:end]
            if end - begin > 1:
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("name", ["llama", *IN_ROWS])
@torch.no_grad()
def test_the_loss_of_a_global_batch_is_that_of_its_texts_alone(name):
    config = small_config(name, (PACKED | IN_ROWS)[name])
    model = small_model(config)
    layout = BatchLayout(probe_packing(config, build_meta(config)).is_isolated)
    loss, count = 0.0, 0
    loader = make_loader(layout)
    for batch in loader.batches(0):
        logits, labels = next_token_outputs(model, batch)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    sequences = packed_sequences().select(loader.describe(0)["samples"])
    assert count == loader.target_token_count(0)
    assert loss == pytest.approx(loss_alone(model, sequences), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["opt", "roberta", "mamba2", "lfm2"])
def test_the_perplexity_is_that_of_the_windows_alone(name, batch_size):
    model = small_model(small_config(name, IN_ROWS[name]))
    windows = packed_sequences().split_texts()
    found = evaluate_perplexity(model, windows, SINGLE_PROCESS, batch_size=batch_size, layout=ROWS)
    assert found.loss == pytest.approx(loss_alone(model, windows) / found.tokens, rel=1e-4)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_texts_of_other_frequencies_share_no_batch(rope_type):
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8, "original_max_position_embeddings": 16}  # fmt: skip
    config = small_config("llama", SMALL | {"rope_parameters": rope, "max_position_embeddings": 16})
    model, layout = small_model(config), BatchLayout(packs=False, max_batched_length=16)
    reset_dynamic_rope(model)
    texts = packed_sequences().split_texts()
    expected = sum(loss_alone(small_model(config), texts.select([i])) for i in range(len(texts)))
    batches = [collate_batch(b, has_positions=False) for b in layout.training_batches(texts, 4, 32)]
    with torch.no_grad():
        outputs = [next_token_outputs(model, batch) for batch in batches]
    loss = sum(
        F.cross_entropy(logits, labels, reduction="sum").item() for logits, labels in outputs
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    for _ in range(2):
        found = evaluate_perplexity(model, texts, SINGLE_PROCESS, batch_size=3, layout=layout)
        assert found.loss * found.tokens == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_get_every_target_once_in_equally_many_batches(world_size):
    for index in range(3):
        batches = [
            list(make_loader(ROWS, rank, world_size).batches(index)) for rank in range(world_size)
        ]
        assert len({len(of_rank) for of_rank in batches}) == 1
        everything = [batch for of_rank in batches for batch in of_rank]
        assert targets(everything) == targets(make_loader(BatchLayout()).batches(index))


def test_a_batch_of_texts_is_no_larger_than_one_of_sequences():
    for batch in make_loader(ROWS).batches(0):
        assert "position_ids" not in batch
        assert batch["input_ids"].numel() <= 2 * MAX_SEQ_LEN


def test_without_packing_in_data_the_texts_are_the_sequences():
    sequences = packed_sequences().split_texts()
    again = sequences.split_texts()
    assert again.begin.tolist() == sequences.begin.tolist()
    assert again.end.tolist() == sequences.end.tolist()


def test_sequences_of_single_tokens_make_a_batch_without_targets():
    """Cuts can leave the end of one text and the start of another, and nothing else."""
    sequences = packed_sequences((1, 1, 1, 1), max_seq_len=2)
    (batch,) = [
        collate_batch(b, has_positions=False) for b in ROWS.training_batches(sequences, 2, 2)
    ]
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 2] * 2
