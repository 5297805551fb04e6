"""Which files a model's folder, an adapter and a folder of texts stand for."""

from pathlib import Path

from hqqtrain.common.inputs import (
    adapter_files,
    is_pattern,
    matching_files,
    model_files,
    pattern_root,
    text_files,
)


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_copies_of_the_weights_and_a_downloaders_files_do_not_count(tmp_path):
    kept = ["config.json", "merges.txt", "model.safetensors", "spiece.model", "tokenizer.json"]
    other = ["pytorch_model.bin", "consolidated.00.safetensors", "model.fp16.safetensors"]
    _touch(tmp_path, *kept, *other, ".cache/x.json", "original/model.safetensors", "README.md",
           ".hidden.json")  # fmt: skip
    assert model_files(tmp_path) == kept


def test_weights_of_other_programs_count_if_there_are_no_others(tmp_path):
    _touch(tmp_path, "config.json", "qmodel.pt", "pytorch_model.bin")
    assert model_files(tmp_path) == ["config.json", "qmodel.pt"]
    _touch(tmp_path, "model.safetensors")
    assert model_files(tmp_path) == ["config.json", "model.safetensors"]


def test_a_run_stands_for_its_base_and_its_adapter(tmp_path):
    _touch(tmp_path, "quantized/config.json", "quantized/model.safetensors", "metrics.jsonl",
           "adapter/adapter_config.json", "adapter/README.md", "summary.json")  # fmt: skip
    assert model_files(tmp_path) == [
        "quantized/config.json", "quantized/model.safetensors", "adapter/adapter_config.json",
    ]  # fmt: skip
    assert adapter_files(tmp_path / "adapter") == ["adapter_config.json"]


def test_a_run_that_has_quantized_nothing_stands_for_its_adapter(tmp_path):
    _touch(tmp_path, "adapter/adapter_config.json", "summary.json")
    assert model_files(tmp_path) == ["adapter/adapter_config.json"]


def test_hidden_files_are_no_text(tmp_path):
    _touch(tmp_path, "b.txt", "a/c.txt", ".git/d.txt", "a/.e.txt")
    assert text_files(tmp_path) == ["a/c.txt", "b.txt"]


def test_a_pattern_stands_for_files_below_its_root(tmp_path):
    _touch(tmp_path, "b.txt", "a.txt", "c.md", ".d.txt", "x/e.txt", "x/y/f.txt", "z.txt/g.md")
    for pattern, names in {
        "*.txt": ["a.txt", "b.txt"], "[ac].*": ["a.txt", "c.md"], "?/*.txt": ["x/e.txt"],
        "x/**/*": ["x/e.txt", "x/y/f.txt"], "*.csv": [],
    }.items():  # fmt: skip
        assert is_pattern(tmp_path / pattern)
        found = matching_files(tmp_path / pattern)
        assert [str(file.relative_to(tmp_path)) for file in found] == names, pattern
    assert pattern_root(tmp_path / "x" / "*" / "y.txt") == tmp_path / "x"
    assert pattern_root(Path("*.txt")) == Path()
    assert not is_pattern(tmp_path / "a.txt")


def test_every_chat_template_counts(tmp_path):
    _touch(tmp_path, "additional_chat_templates/tool_use.jinja", "chat_template.jinja")
    assert model_files(tmp_path) == [
        "additional_chat_templates/tool_use.jinja", "chat_template.jinja",
    ]  # fmt: skip
