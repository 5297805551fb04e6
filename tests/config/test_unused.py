"""Settings without effect are reported, for every task and key; all others are not."""

import pytest

from hqqtrain.compose.schema import known_keys
from hqqtrain.config.run import TASKS, RunConfig
from hqqtrain.config.unused import UNUSED_KEYS, USED_KEYS, unused_settings

KEYS = [key for key, _ in known_keys() if key != "sweep"]


def _unused(task: str, *given: str, **groups: dict) -> list[str]:
    config = RunConfig(task=task)
    for group, values in groups.items():
        for name, value in values.items():
            setattr(getattr(config, group), name, value)
    return [message.split(":")[0] for message in unused_settings(config, given)]


def test_every_task_has_its_keys_and_every_pattern_matches_a_key():
    assert USED_KEYS.keys() == UNUSED_KEYS.keys() == TASKS.keys()
    groups = {key.partition(".")[0] for key in KEYS}
    for pattern in {p for keys in (*USED_KEYS.values(), *UNUSED_KEYS.values()) for p in keys}:
        assert pattern.removesuffix(".*").rstrip("*") in {*KEYS, *groups, ""}, pattern


@pytest.mark.parametrize(
    ("task", "used", "unused"),
    [
        ("finetune", ["optim.lr", "eval.tokens", "ckpt.every"],
         ["export.format", "data.show", "generate.prompt"]),
        ("quantize", ["quant.nbits", "quant.overrides.q", "train.precision", "model"],
         ["eval.tokens", "eval.source", "optim.lr", "train.max_steps", "data.source", "adapter.r",
          "export.format", "ckpt.every", "track.backends", "train.max_seq_len"]),
        ("eval", ["eval.tokens", "data.source", "train.max_seq_len", "adapter.init_from"],
         ["eval.every", "optim.lr", "train.max_steps", "adapter.r", "quant.save", "track.project"]),
        ("export", ["export.format", "adapter.init_from", "quant.nbits", "eval.tokens",
          "data.source", "train.max_seq_len"],
         ["eval.reference", "optim.lr", "quant.save"]),
        ("data", ["data.show", "data.source", "train.max_seq_len", "model.source", "eval.tokens",
          "eval.protocol"],
         ["quant.nbits", "optim.lr", "eval.every", "adapter.init_from", "parallel.strategy"]),
        ("generate", ["generate.top_p", "model.name_or_path", "quant.nbits", "adapter.init_from",
          "data.chat_template", "train.precision", "run.root"],
         ["data.source", "optim.lr", "parallel.strategy", "run.name", "quant.save", "eval.source",
          "train.max_seq_len"]),
    ],
)  # fmt: skip
def test_the_keys_of_a_task(task, used, unused):
    data_free = {"quant": {"calibration": None}}
    assert _unused(task, *used, **data_free) == []
    assert _unused(task, *unused, **data_free) == unused


def test_without_quantization_most_of_its_keys_have_no_effect():
    keys = ["quant.nbits", "quant.skip", "quant.group_size", "quant.solver", "quant.calibration",
            "quant.save", "quant.cache_dir", "quant.overrides"]  # fmt: skip
    control = {"quant": {"nbits": None, "overrides": {"o_proj": None}}}
    assert _unused("finetune", *keys, **control) == keys[2:-1]
    control["quant"]["overrides"]["q_proj"] = {"nbits": 2}
    assert _unused("finetune", *keys, **control) == keys[2:]
    cached = {"reference": "cached"}
    references = ["eval.reference", "eval.cache_dir"]
    assert _unused("finetune", *references, **control, eval=cached) == references
    assert _unused("finetune", "eval.reference", **control) == []


def test_a_key_that_another_one_makes_ineffective():
    assert _unused("finetune", "train.epochs", train={"max_steps": 5}) == ["train.epochs"]
    assert _unused("finetune", "train.epochs") == []
    sampling = ["generate.top_p", "generate.top_k", "generate.min_p", "generate.seed"]
    assert _unused("generate", *sampling, generate={"temperature": 0.0}) == sampling
    assert _unused("generate", *sampling) == []
    for key in ("eval.tokens", "eval.protocol"):
        assert _unused("finetune", key, eval={"source": None}) == [key]
    assert _unused("finetune", "track.project", track={"backends": []}) == ["track.project"]
    data_free = {"quant": {"calibration": None}}
    tokens = ["quant.calibration_tokens"]
    assert _unused("quantize", *tokens, **data_free) == tokens
    assert _unused("quantize", *tokens, quant={"nbits": 8}) == tokens
    assert _unused("quantize", *tokens) == []
    hqq = {"quant": {"solver": "hqq", "calibration": "auto"}}
    keys = ["quant.calibration", "data.source"]
    assert _unused("quantize", *keys, **hqq) == keys
    gptq = {
        "quant": {"solver": "hqq", "calibration": "auto", "overrides": {"q": {"solver": "gptq"}}}
    }
    assert _unused("quantize", "quant.calibration", "data.source", "eval.source", **gptq) == []
    assert _unused("quantize", "data.show", "eval.tokens", **gptq) == ["data.show", "eval.tokens"]
    text = {"data": {"source": "mine.txt"}}
    assert _unused("finetune", "data.text_field") == ["data.text_field"]
    assert _unused("finetune", "data.text_field", **text) == []
    own = {"quant": {"calibration": "mine.txt"}}
    assert _unused("finetune", "data.text_field", "data.format", **own) == ["data.format"]
    chat = {"data": {"source": "mine.jsonl", "format": "chat"}}
    assert _unused("finetune", "data.text_field", **chat) == ["data.text_field"]
    built_in = {"data": {"source": ["python_stdlib", {"path": "python_stdlib_chat"}]}}
    assert _unused("finetune", "data.format", **built_in) == ["data.format"]
    mixed = {"data": {"source": ["python_stdlib", "mine.txt"]}}
    assert _unused("finetune", "data.format", **mixed) == []
    assert _unused("finetune", "data.validation") == ["data.validation"]  # split by module names
    assert _unused("finetune", "data.validation", **text, eval={"source": "auto"}) == []
    other = {"source": "other.txt"}
    assert _unused("finetune", "data.validation", **text, eval=other) == ["data.validation"]


def test_keys_that_streaming_makes_ineffective():
    keys, streaming = ["data.shuffle_buffer", "data.cache_dir"], {"data": {"streaming": True}}
    assert _unused("finetune", *keys, "data.workers") == ["data.shuffle_buffer"]
    assert _unused("finetune", *keys, "data.workers", **streaming) == ["data.cache_dir"]


def test_only_a_cached_reference_has_a_folder():
    key = "eval.cache_dir"
    assert _unused("finetune", key) == _unused("eval", key, eval={"reference": "streamed"}) == [key]
    assert _unused("eval", key, eval={"reference": "cached"}) == []
    assert _unused("eval", key, eval={"reference": "cached", "source": None}) == [key]


def test_a_key_is_reported_once():
    assert _unused("quantize", "train.epochs", train={"max_steps": 5}) == ["train.epochs"]


def test_switching_off_what_a_task_does_not_do_is_no_mistake():
    off = {"track": {"backends": []}, "eval": {"source": None, "reference": "off"}}
    keys = ["track.backends", "eval.source", "eval.reference"]
    data_free = {"quant": {"calibration": None}}
    for task, used in (("quantize", []), ("export", ["eval.source"])):
        assert _unused(task, *keys, **off, **data_free) == []
        unused = [key for key in keys if key not in used]
        assert _unused(task, *keys, **data_free) == unused
    assert _unused("eval", "track.backends", **off) == []
    assert _unused("eval", "track.backends") == ["track.backends"]


@pytest.mark.parametrize("key", ["export.gguf_type", "export.llama_cpp"])
def test_keys_of_gguf_files_need_the_format(key):
    config = RunConfig(task="export")
    (message,) = unused_settings(config, [key])
    assert message == f"{key}: is not used, because export.format=dense is not gguf."
    config.export.format = "gguf"
    assert not list(unused_settings(config, [key]))
