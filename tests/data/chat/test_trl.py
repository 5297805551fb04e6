"""The trained tokens of conversations against TRL's, and each place where TRL trains others.

TRL masks by the marks of the template, or of its own variant of the template. `ONLY_TRL` says what
else it trains, and the tests check that it does: an entry that TRL mends fails here.
"""

# ruff: noqa: RUF001 - DeepSeek's markers are written with a fullwidth bar

from itertools import groupby

import pytest
from chat_conversations import ANSWER_1, ANSWER_2, ASK_1, ASK_2, CONVERSATIONS, SYSTEM
from chat_templates import exact_conversations, example, render, tokenizer_for
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.data.chat.encoding import ChatEncoder
from hqqtrain.data.chat.template import ChatTemplate

trl = pytest.importorskip("trl", reason="TRL is not installed here")

LINE = "the line break after the end-of-turn token, which no model writes"
PROMPT = "what the prompt at inference already holds"
ONLY_TRL: dict[str, tuple[set[str], str]] = {
    "trl/cohere_training": (set(), ""),
    "trl/cohere2_training": (set(), ""),
    "trl/llama3_training": (set(), ""),
    "trl/glm4moe_training": (set(), ""),
    "trl/gemma_training": ({"\n"}, LINE),
    "trl/gemma3_training": ({"\n"}, LINE),
    "trl/lfm2_training": ({"\n"}, LINE),
    "trl/lfm2_v2_training": ({"\n"}, LINE),
    "trl/nemotron_3_nano_training": ({"\n", "<think>\n"}, f"{LINE}, and {PROMPT}"),
    "trl/qwen2_5_training": ({"\n"}, f"{LINE}, and the one that ends the header"),
    "trl/qwen2_5_vl_training": ({"\n"}, LINE),
    "trl/qwen3_training": ({"\n"}, LINE),
    "trl/qwen3_vl_training": ({"\n"}, LINE),
    "trl/qwen3_instruct_2507_training": ({"\n"}, LINE),
    "trl/qwen3_5_think_training": ({"\n", "<think>\n"}, f"{LINE}, and {PROMPT}"),
    "trl/qwen3_5_nothink_training": ({"\n", "<think>\n\n</think>\n\n"}, f"{LINE}, and {PROMPT}"),
    "trl/phi3_training": ({"\n", "\n<|endoftext|>"}, f"{LINE}, and the end of the whole text"),
    "trl/deepseekv3_training": ({"<｜Assistant｜>", "<｜tool▁outputs▁end｜>"}, PROMPT),
    "trl/deepseek_r1_distill_training": (
        {"<｜Assistant｜>", "<｜Assistant｜><think>\n"},
        PROMPT,
    ),
    "trl/gptoss_training": ({"<|start|>assistant"}, PROMPT),
    "trl/muse_glimmer_training": ({"<|start|>assistant"}, PROMPT),
}


def ours(name: str, loss_on: str, row) -> tuple[list[int], list[bool]]:
    tokenizer = tokenizer_for(name, looks_ahead=False)
    ids, targets = ChatEncoder(tokenizer, ChatTemplate(tokenizer, None), loss_on).encode(row)
    return [int(i) for i in ids], [bool(t) for t in targets]


def runs_of(tokenizer, ids: list[int], chosen: list[bool]) -> list[str]:
    """Return the text of each run of chosen tokens."""
    groups = groupby(zip(ids, chosen, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for wanted, run in groups if wanted]


def follow_a_prompt(name: str, row: str, ids: list[int]) -> list[bool]:
    """Whether the tokens begin with those of the prompt at inference, for each answer of a row."""
    tokenizer, (messages, tools) = tokenizer_for(name, looks_ahead=False), CONVERSATIONS[row]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [
        tokenizer.apply_chat_template(
            messages[:i], tools=tools, add_generation_prompt=True, return_dict=False
        )
        for i in answers
    ]
    return [ids[: len(prompt)] == prompt for prompt in prompts]


@pytest.mark.parametrize("name", ONLY_TRL)
def test_assistant_tokens_are_those_of_trl_but_for_what_the_table_says(name):
    tokenizer, more = tokenizer_for(name, looks_ahead=False), set()
    for row in exact_conversations(name):
        messages, tools = CONVERSATIONS[row]
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, targets = ours(name, "assistant", example(row))
        if ids != theirs["input_ids"]:  # TRL trains a token that lies across the end of a prompt
            assert tokenizer.decode(ids) == tokenizer.decode(theirs["input_ids"]), row
            ours_follow = follow_a_prompt(name, row, ids)
            assert ours_follow > follow_a_prompt(name, row, theirs["input_ids"]), row
            continue
        mask = [bool(m) for m in theirs["assistant_masks"]]
        assert not any(t and not m for t, m in zip(targets, mask, strict=True)), row
        only = [m and not t for t, m in zip(targets, mask, strict=True)]
        more.update(runs_of(tokenizer, ids, only))
    assert more == ONLY_TRL[name][0]


def sft_rows(tmp_path, tokenizer, rows: list[dict], **settings) -> list[tuple[list, list]]:
    """Return the ids of each row and whether TRL's SFTTrainer trains them."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(config),
        trl.SFTConfig(
            str(tmp_path), max_length=None, report_to="none", use_cpu=True, bf16=False, **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    labels = (row.get("labels", row["input_ids"]) for row in trainer.train_dataset)
    return [
        (row["input_ids"], [label != -100 for label in row_labels])
        for row, row_labels in zip(trainer.train_dataset, labels, strict=True)
    ]


def test_assistant_only_loss_of_the_trainer_is_ours(tmp_path):
    name, rows = "trl/llama3_training", ["one", "turns", "system_turns", "unicode", "padded"]
    theirs = sft_rows(
        tmp_path,
        tokenizer_for(name, looks_ahead=False),
        [{"messages": CONVERSATIONS[row][0]} for row in rows],
        assistant_only_loss=True,
    )
    assert theirs == [ours(name, "assistant", example(row)) for row in rows]


def test_assistant_only_loss_trains_another_text_than_the_model_s_template_makes(tmp_path):
    """TRL puts its variant of Qwen3's template in: it adds empty thoughts to earlier answers."""
    tokenizer = tokenizer_for("trl/qwen3", looks_ahead=False)
    rows = [{"messages": CONVERSATIONS["turns"][0]}]
    ((ids, _),) = sft_rows(tmp_path, tokenizer, rows, assistant_only_loss=True)
    own_text = render("trl/qwen3", "turns")
    assert tokenizer.decode(ids).count("<think>") == 3
    assert own_text.count("<think>") == 1
    assert tokenizer.decode(ours("trl/qwen3", "assistant", example("turns"))[0]) == own_text


COMPLETIONS = {
    "answer": ([SYSTEM, ASK_1], [ANSWER_1]),
    "later answer": ([ASK_1, ANSWER_1, ASK_2], [ANSWER_2]),
    "more turns": ([ASK_1], [ANSWER_1, ASK_2, ANSWER_2]),
}


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.2-3B-Instruct", "Qwen-Qwen2.5-7B-Instruct"])
def test_completion_only_loss_of_the_trainer_is_ours_but_for_other_turns(name, tmp_path):
    """TRL trains all that follows the prompt: line breaks, headers, and the user's turns."""
    tokenizer = tokenizer_for(name, looks_ahead=False)
    rows = [{"prompt": prompt, "completion": rest} for prompt, rest in COMPLETIONS.values()]
    for (prompt, rest), (their_ids, mask) in zip(
        COMPLETIONS.values(), sft_rows(tmp_path, tokenizer, rows), strict=True
    ):
        row = example(messages=prompt + rest, completion_start=len(prompt))
        ids, targets = ours(name, "completion", row)
        assert ids == their_ids
        assert not any(t and not m for t, m in zip(targets, mask, strict=True))
        only = [m and not t for t, m in zip(targets, mask, strict=True)]
        more = "".join(runs_of(tokenizer, ids, only)).strip()
        assert (ASK_2["content"] in more) == (len(rest) > 1)
        assert bool(more) == (len(rest) > 1)
