"""Outputs and labels are aligned as transformers' own loss aligns them."""

import pytest
import torch

from hqqtrain.models.causal_lm import next_token_outputs


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 2), (3, 7)])
def test_the_loss_is_that_of_transformers(make_model, sequences, tokens):
    model = make_model()
    ids = torch.randint(0, 96, (sequences, tokens))
    labels = ids.clone()
    labels[0, 1:2] = -100 if tokens > 2 else labels[0, 1]
    batch = {"input_ids": ids, "labels": labels}
    logits, next_labels = next_token_outputs(model, batch)
    assert logits.shape == (sequences * (tokens - 1), 96)
    loss = torch.nn.functional.cross_entropy(logits, next_labels, ignore_index=-100)
    torch.testing.assert_close(loss, model(**batch).loss)


def test_the_other_entries_of_a_batch_are_arguments(make_model):
    """With the positions of two packed sequences, the second one does not see the first."""
    model, ids = make_model(), torch.randint(0, 96, (1, 6))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
    packed, _ = next_token_outputs(model, batch)
    alone, _ = next_token_outputs(model, {"input_ids": ids[:, 3:], "labels": ids[:, 3:]})
    torch.testing.assert_close(packed[3:], alone)
