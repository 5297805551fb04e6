"""Greedy continuations: the same as transformers' own, and nothing of the run changes."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.evaluation import continuations
from hqqtrain.evaluation.continuations import (
    continue_greedily,
    select_beginnings,
    select_prompts,
)


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_dropout=0.5, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(0)


def texts(*lengths: int) -> TokenSequences:
    starts = np.cumsum([0, *lengths[:-1]])
    stream = np.arange(sum(lengths), dtype=np.int32)
    ends = np.append(starts[1:], len(stream))
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, starts, ends)


def test_the_continuations_are_those_of_transformers(model):
    prompts = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(1))
    expected = model.eval().generate(prompts, max_new_tokens=9, do_sample=False)
    found = continue_greedily(model, prompts, SINGLE_PROCESS, new_tokens=9)
    assert found.tolist() == expected[:, 7:].tolist()
    assert len(set(map(tuple, found.tolist()))) == 3


def test_prompts_of_different_lengths_are_continued_as_alone(model):
    prompts = [torch.tensor([5, 6, 7, 8, 9, 10]), torch.tensor([3]), torch.tensor([11, 12])]
    found = continue_greedily(model, prompts, SINGLE_PROCESS, new_tokens=5)
    for prompt, row in zip(prompts, found, strict=True):
        alone = continue_greedily(model, prompt[None], SINGLE_PROCESS, new_tokens=5)
        assert row.tolist() == alone[0].tolist()


def test_a_prompt_of_a_chat_ends_where_its_last_answer_begins():
    chats = texts(10, 12, 4, 30)
    chats.targets[:] = False
    for span in (slice(3, 5), slice(7, 9), slice(14, 17), slice(30, 40), slice(45, 56)):
        chats.targets[span] = True
    found = select_prompts(chats, 3, max_tokens=36, new_tokens=2)  # 12 tokens for each of three
    assert [(p.tolist(), a.tolist()) for p, a in found] == [
        ([*range(7)], [7, 8]), ([*range(10, 14)], [14, 15, 16])
    ]  # fmt: skip
    assert len(select_prompts(chats, 3, max_tokens=100, new_tokens=2)) == 3
    assert select_prompts(chats, 3, max_tokens=5, new_tokens=2) == []
    chats.stream[10:14] = chats.stream[:4]
    chats.targets[:10] = [False] * 4 + [True] * 6
    assert len(select_prompts(chats, 2, max_tokens=40, new_tokens=2)) == 1  # the same prompt


def _rank_with_another_model(rank: int, comm: Communicator) -> None:
    prompts = torch.tensor([[1, 2], [3, 4]])
    tokens = continue_greedily(make_model(rank), prompts, comm, new_tokens=6)
    expected = continue_greedily(make_model(0), prompts, SINGLE_PROCESS, new_tokens=6)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.ranks
def test_all_ranks_take_the_tokens_of_rank_0():
    assert on_ranks(_rank_with_another_model, 2) == ["", ""]


def test_neither_random_numbers_nor_the_mode_of_the_model_change(model):
    model.train()
    torch.manual_seed(5)
    before, calls = torch.get_rng_state(), []
    prompts = torch.tensor([[1, 2, 3]])
    first = continue_greedily(
        model, prompts, SINGLE_PROCESS, new_tokens=4, on_token=lambda: calls.append(1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert len(calls) == 4
    assert torch.equal(first, continue_greedily(model, prompts, SINGLE_PROCESS, new_tokens=4))


def test_a_slow_model_gives_fewer_tokens(model, monkeypatch):
    monkeypatch.setattr(continuations, "MAX_SECONDS", -1.0)
    assert continue_greedily(model, torch.tensor([[1]]), SINGLE_PROCESS, new_tokens=50).shape == (
        1,
        1,
    )


@pytest.mark.parametrize(
    ("lengths", "count", "length", "starts", "shape"),
    [
        ((50, 3, 60, 70, 80), 3, 40, [0, 53, 183], (3, 40)),
        ((50, 3, 60), 3, 40, [0, 53], (2, 40)),
        ((5, 3, 9), 2, 40, [8], (1, 9)),
        ((2,), 3, 64, [0], (1, 2)),
    ],
)
def test_texts_that_are_long_enough_are_taken_at_equal_distances(
    lengths, count, length, starts, shape
):
    rows = select_beginnings(texts(*lengths), count, length)
    assert rows.shape == shape
    assert rows[:, 0].tolist() == starts
    assert (rows[0] == torch.arange(shape[1]) + starts[0]).all()


@pytest.mark.parametrize("changed", [0, 1, 8])
def test_no_prompt_is_shown_twice(changed):
    held_out = texts(8, 8, 8)
    held_out.stream[8:16] = held_out.stream[:8]
    held_out.stream[16 - changed : 16] += 100  # the second text ends differently, or all of it does
    rows = select_beginnings(held_out, 3, 8)
    assert rows[:, 0].tolist() == ([0, 100, 16] if changed == 8 else [0, 16])
