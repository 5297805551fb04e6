"""The tensors of a model are streamed to a file, and a failure does not stop the stream."""

import pytest
import torch
from exports import model_export

from hqqtrain.formats.gguf.block_types import Q4_1
from hqqtrain.formats.gguf.conversion import FamilyConversion
from hqqtrain.formats.gguf.tensors import TensorStream, gguf_entries


class _File:
    def __init__(self, fail: str = "") -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.fail, self.is_finished = fail, False

    def write(self, name: str, data: torch.Tensor) -> None:
        if name == self.fail:
            raise OSError("full")
        self.shapes[name] = tuple(data.shape)

    def finish(self) -> None:
        self.is_finished = True


def _stream(trained, consumed: list[str]) -> TensorStream:
    export = model_export(trained)
    tensors = list(export.tensors())

    class Export(type(export)):
        def tensors(self):
            for name, tensor in tensors:
                consumed.append(name)
                yield name, tensor

    export = Export(**export.__dict__)
    kinds = dict.fromkeys(trained.settings.modules, Q4_1)
    conversion = FamilyConversion(export, torch.float16)
    stream = TensorStream(export, conversion, kinds, torch.float16)
    stream.entries = gguf_entries(export, conversion, kinds)  # type: ignore[attr-defined]
    return stream


def test_all_tensors_of_the_plan_are_written(make_wide):
    trained, file = make_wide("qwen2", group_size=32), _File()
    stream = _stream(trained, [])
    stream.write(file)
    assert file.is_finished
    assert file.shapes == {name: e.stored_shape if e.type == "Q4_1" else e.shape
                           for name, e in stream.entries.items()}  # fmt: skip


def test_a_failure_does_not_stop_the_stream(make_wide):
    """Other ranks would wait for this one in a gather."""
    trained, consumed = make_wide(group_size=32), []
    with pytest.raises(OSError, match="full"):
        _stream(trained, consumed).write(_File("token_embd.weight"))
    assert consumed[-1] == "lm_head.weight"


def test_a_rank_without_the_file_takes_part(make_wide):
    consumed: list[str] = []
    _stream(make_wide(group_size=32), consumed).write(None)
    assert len(consumed) > 40
