"""The losses of TRL's SFTTrainer on the same rows, where it trains the same tokens."""

import copy
from pathlib import Path

import pytest
import torch
from chat_conversations import ANSWER_1, ANSWER_2, ASK_1, ASK_2, CONVERSATIONS, SYSTEM
from chat_templates import example, tokenizer_for
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.data.examples import Completion, Example
from hqqtrain.data.layout import collate_batch
from hqqtrain.data.packing import pack_examples
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.next_token import NextTokenLoss

trl = pytest.importorskip("trl", reason="TRL is not installed here")

CHATS = ["one", "turns", "system_turns", "unicode"]
PAIRS = [([SYSTEM, ASK_1], [ANSWER_1]), ([ASK_1, ANSWER_1, ASK_2], [ANSWER_2])]
TEXTS = [
    ("Which mountain is highest?", " Everest, in the Himalayas."),
    ("Bern:", " bright sunshine"),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # so that the losses of different tokens differ
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def their_loss(model, tokenizer, rows: list[dict], folder: Path, **settings) -> float:
    """Return the loss that TRL logs of a step whose batch is all rows."""
    arguments = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        max_length=None,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = trl.SFTTrainer(
        copy.deepcopy(model),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def our_loss(model, tokenizer, examples: list[Example], packing: bool) -> float:
    sequences = pack_examples(examples, tokenizer, max_seq_len=1024, packing=packing).sequences
    loss = ModelLoss(model, NextTokenLoss(), SINGLE_PROCESS, max_tokens=4096)
    with torch.no_grad():
        summed, count = loss(collate_batch(sequences, has_positions=True))
    return float(summed / count)


def assert_same_loss(model, tokenizer, examples: list[Example], theirs: float) -> None:
    for packing in (False, True):
        assert our_loss(model, tokenizer, examples, packing) == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["trl/llama3_training", "trl/cohere_training", "trl/glm4moe_training"]
)
def test_assistant_only_loss(model, name, tmp_path):
    tokenizer, rows = (
        tokenizer_for(name, looks_ahead=False),
        [{"messages": CONVERSATIONS[row][0]} for row in CHATS],
    )
    theirs = their_loss(model, tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert_same_loss(model, tokenizer, [example(row) for row in CHATS], theirs)


@pytest.mark.parametrize("name", ["microsoft-phi-4", "trl/cohere"])
def test_completion_only_loss_of_messages(model, name, tmp_path):
    tokenizer = tokenizer_for(name, looks_ahead=False)
    rows = [{"prompt": prompt, "completion": rest} for prompt, rest in PAIRS]
    examples = [example(messages=a + b, completion_start=len(a)) for a, b in PAIRS]
    assert_same_loss(model, tokenizer, examples, their_loss(model, tokenizer, rows, tmp_path))


def test_completion_only_loss_of_texts(model, tmp_path):
    tokenizer = tokenizer_for("microsoft-phi-4", looks_ahead=False)
    rows = [{"prompt": prompt, "completion": rest} for prompt, rest in TEXTS]
    theirs = their_loss(model, tokenizer, rows, tmp_path)
    assert_same_loss(model, tokenizer, [Completion(*pair) for pair in TEXTS], theirs)


def test_loss_with_the_line_break_that_trl_trains_is_another(model, tmp_path):
    tokenizer = tokenizer_for("trl/gemma_training", looks_ahead=False)
    rows = [{"messages": CONVERSATIONS["turns"][0]}]
    theirs = their_loss(model, tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert abs(our_loss(model, tokenizer, [example("turns")], False) - theirs) > 1e-2
