"""The full-precision model is called once for each batch, and every figure keeps its bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation import reference
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.evaluation.reference import ResidentReference, reference_file
from hqqtrain.models.families.structure import output_head

COMM = Communicator(0, 1, torch.device("cpu"))


def _model(seed: int, kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()
    config = Gemma2Config(**sizes, final_logit_softcapping=0.1)
    return Gemma2ForCausalLM(config).to(dtype).eval()


def _sequences() -> TokenSequences:
    stream = np.random.RandomState(0).randint(0, 97, 230).astype(np.int32)
    starts = np.array([0, 33, 101], np.int64)
    begin, end = np.arange(0, 230, 20), np.minimum(np.arange(20, 250, 20), 230)
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, begin, end)


class _Counted:
    """Loads a model, and counts the loads and the calls of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loads, self.calls = model, 0, 0
        model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def load(self) -> nn.Module:
        self.loads += 1
        return self.model


def _evaluate(reference: nn.Module, seed: int) -> EvalResult:
    evaluated = _model(seed)
    return evaluate_perplexity(evaluated, _sequences(), COMM, batch_size=5, reference=reference)


def _open(counted: _Counted, file: Path | None = None) -> ResidentReference:
    with torch.device("meta"):
        structure = type(counted.model)(counted.model.config)
    return ResidentReference(structure, output_head(counted.model), counted.load, file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_called_once_and_the_figures_keep_their_bits(dtype):
    counted = _Counted(_model(0, dtype=dtype))
    expected = [_evaluate(counted.model, seed) for seed in (1, 2)]
    counted.calls = 0
    cached = _open(counted)
    assert [_evaluate(cached, seed) for seed in (1, 2)] == expected
    assert (counted.loads, counted.calls) == (1, 3)


def test_a_later_run_reads_the_file_and_loads_no_model(tmp_path):
    first, file = _Counted(_model(0)), tmp_path / "reference" / "model.safetensors"
    cached = _open(first, file)
    expected = _evaluate(cached, 1)
    cached.save()
    later = _Counted(_model(0))
    again = _open(later, file)
    assert _evaluate(again, 1) == expected
    assert (later.loads, later.calls) == (0, 0)
    written = file.stat().st_mtime_ns
    again.save()
    assert file.stat().st_mtime_ns == written
    # A batch that the file does not have needs the model.
    batch = {"input_ids": torch.arange(6)[None], "position_ids": torch.arange(6)[None]}
    assert torch.equal(again(**batch).logits, _model(0)(**batch).logits)
    assert later.loads == 1


@pytest.mark.parametrize("damage", ["truncated", "no safetensors", "link"])
def test_a_file_that_cannot_be_trusted_is_made_again(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    cached = _open(_Counted(_model(0)), file)
    expected = _evaluate(cached, 1)
    cached.save()
    content = file.read_bytes()
    if damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(content[:-100] if damage == "truncated" else b"no")
    later = _Counted(_model(0))
    again = _open(later, file)
    assert _evaluate(again, 1) == expected
    assert later.loads == 1
    again.save()
    assert file.read_bytes() == content
    assert not file.is_symlink()


def test_the_folder_must_not_be_a_link(tmp_path, caplog):
    (tmp_path / "victim").mkdir()
    (tmp_path / "reference").symlink_to(tmp_path / "victim")
    cached = _open(_Counted(_model(0)), tmp_path / "reference" / "model.safetensors")
    _evaluate(cached, 1)
    cached.save()
    assert list((tmp_path / "victim").iterdir()) == []


def test_a_model_that_caps_its_logits_is_called_every_time():
    counted = _Counted(_model(0, "gemma2"))
    expected = [_evaluate(counted.model, seed) for seed in (1, 2)]
    counted.calls = 0
    cached = _open(counted)
    assert [_evaluate(cached, seed) for seed in (1, 2)] == expected
    assert counted.calls == 6


def test_hidden_states_that_are_too_large_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "MAX_KEPT_BYTES", 10_000)
    counted = _Counted(_model(0))
    cached = _open(counted, tmp_path / "file")
    assert _evaluate(cached, 1) == _evaluate(cached, 1)
    assert counted.calls == 6
    cached.save()
    assert not (tmp_path / "file").exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "reference").write_text("")
    cached = _open(_Counted(_model(0)), tmp_path / "reference" / "file")
    _evaluate(cached, 1)
    cached.save()
    assert "are not kept" in caplog.text


def test_another_model_text_or_machine_has_another_file(monkeypatch):
    files = {reference_file(Path("runs"), "org/model", {"model": i}) for i in range(2)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    files.add(reference_file(Path("runs"), "org/model", {"model": 0}))
    assert len(files) == 3
    assert all(str(file).startswith("runs/reference/model-") for file in files)


def _rank_with_its_batches(rank: int, comm: Communicator) -> None:
    counted, expected = _Counted(_model(0)), []
    for cached in (counted.model, _open(counted)):
        counted.calls = 0
        for seed in (1, 2):
            result = evaluate_perplexity(
                _model(seed), _sequences(), comm, batch_size=5, reference=cached
            )
            expected.append(result)
    assert expected[:2] == expected[2:]
    # Three batches for two ranks: rank 1 repeats the first one, which it does not have yet.
    assert counted.calls == 2
    assert counted.loads == 1


@pytest.mark.ranks
def test_each_rank_keeps_the_outputs_for_its_own_batches():
    assert on_ranks(_rank_with_its_batches, 2) == ["", ""]
