"""Names of other tools: each leads to a key of ours that exists."""

import re

import pytest

from hqqtrain.cli import main
from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.schema import known_keys
from hqqtrain.config.foreign_names import FOREIGN_NAMES, NEEDLESS_NAMES, our_name

KEYS = {key for key, _ in known_keys()}


def test_every_suggestion_is_a_key_and_no_foreign_name_is():
    assert {ours.partition("=")[0] for ours in FOREIGN_NAMES.values()} <= KEYS
    assert not (FOREIGN_NAMES.keys() | NEEDLESS_NAMES.keys()) & KEYS
    assert not FOREIGN_NAMES.keys() & NEEDLESS_NAMES.keys()
    names = set(re.findall(r"\b[a-z]+\.[a-z_]+\b", " ".join(NEEDLESS_NAMES.values())))
    assert names - {"config.json"} <= KEYS


@pytest.mark.parametrize(
    ("override", "ours"),
    [
        ("learning_rate=1e-4", "optim.lr"), ("train.learning_rate=1e-4", "optim.lr"),
        ("lora_r=8", "adapter.r"), ("adapter.lora_r=8", "adapter.r"), ("bits=4", "quant.nbits"),
        ("w_bit=4", "quant.nbits"), ("quant.bits=4", "quant.nbits"),
        ("gradient_accumulation_steps=4", "train.global_batch_size"),
        ("num_train_epochs=3", "train.epochs"), ("train.num-train-epochs=3", "train.epochs"),
        ("per_device_train_batch_size=2", "train.micro_batch_size"),
        ("output_dir=x", "run.root"), ("load_in_4bit=true", "quant.nbits=4"),
        ("max_seq_length=512", "train.max_seq_len"), ("dataset=x", "data.source"),
        ("report_to=wandb", "track.backends"), ("warmup_ratio=0.1", "optim.warmup_steps"),
        ("val_set_size=0.1", "data.validation"), ("model.name=x", "model.name_or_path"),
        ("data.path=x", "data.source"), ("eval.steps=5", "eval.every"),
        ("tokens=[a]", "data.add_tokens"), ("new_special_tokens=[a]", "data.add_tokens"),
        ("lora_modules_to_save=[a]", "adapter.modules_to_save"),
        ("stage=sft", "data.format"), ("finetuning_type=lora", "adapter.kind"),
        ("template=qwen", "data.chat_template"), ("neat_packing=true", "train.packing"),
        ("interleave_probs=1", "data.source"),
        ("lora_target_linear=true", "adapter.target_modules=all-linear"),
        ("overwrite_output_dir=true", "run.resume=never"), ("do_train=true", "task=finetune"),
    ],
)  # fmt: skip
def test_the_error_names_our_key(override, ours):
    with pytest.raises(UserError, match=rf"unknown key. Did you mean '{ours}'"):
        compose_config([override])


@pytest.mark.parametrize(
    "key", ["logging_steps", "train.max_samples", "train.logging-steps", "data.split"]
)
def test_a_name_without_a_counterpart_is_to_be_left_out(key):
    with pytest.raises(UserError, match=rf"^{key}: unknown key. Leave it out: \w+"):
        compose_config([f"{key}=1"])


def test_a_source_has_the_hints_of_the_keys():
    with pytest.raises(UserError, match=r"data\.source\[0\]\.split: unknown key. Leave it out: "):
        compose_config(["data.source=[{path: a.jsonl, split: train}]"])


def test_a_remark_is_about_the_name_or_about_our_key():
    assert our_name("stage") == (
        "'data.format' (chat for sft, text for pt; preference training, such as dpo, is not "
        "supported)"
    )
    assert our_name("dataset_type") == "'data.format'"
    assert "no full fine-tuning" in str(our_name("finetuning_type"))


def test_our_own_names_are_found_as_before():
    assert our_name("nbits") is None
    with pytest.raises(UserError, match=r"Did you mean 'optim\.lr'"):
        compose_config(["lr=1"])


def test_a_single_value_for_a_group():
    with pytest.raises(UserError, match=r"^optim=adamw: must be a mapping.* for 'optim\.name'"):
        compose_config(["optim=adamw"])


def test_all_mistakes_of_a_command_are_reported_at_once():
    words = ["train.checkpointing=true", "quant.storage=uint8", "lora_r=8", "quant.nbits=four"]
    with pytest.raises(UserError) as caught:
        compose_config(words)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "train.checkpointing", "quant.storage", "lora_r", "quant.nbits=four",
        "Groups and keys",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--learning_rate=1e-4", "Did you mean 'optim.lr'? Keys have no dashes"),
        ("--lora-r", "Did you mean 'adapter.r'?"),
        ("--optim.lr=1", "Keys have no dashes: optim.lr=1."),
        ("--chek", "Did you mean '--check'?"),
    ],
)
def test_an_option_in_the_form_of_other_tools(option, hint, capsys):
    assert main([option]) == 2
    assert hint in capsys.readouterr().err
