"""An adapter as llama.cpp reads it; `targets/test_gguf.py` compares its matrices."""

import pytest
import torch
from exports import model_export
from gguf import GGUFReader

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.formats.gguf.adapter import write_gguf_adapter
from hqqtrain.formats.gguf.conversion import FamilyConversion


@pytest.fixture
def written(make_wide, tmp_path):
    """Return a function that writes an adapter for a base with tensors of some names."""

    def write(names: set[str], dtype: torch.dtype = torch.float16):
        trained = make_wide(group_size=32, solver="rtn", adapter=AdapterConfig(r=4, alpha=8))
        conversion = FamilyConversion(model_export(trained), dtype)
        path = tmp_path / "adapter.gguf"
        names = names or {conversion.name(f"{m}.weight") for m in trained.settings.modules}
        write_gguf_adapter(trained.adapter, path, conversion, dtype, names)
        return GGUFReader(path)

    return write


def test_the_dtype_and_alpha(written):
    reader = written(set())
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F16"}
    assert reader.get_field("adapter.lora.alpha").contents() == 8
    assert len(reader.tensors) == 28


def test_a_tensor_that_the_base_does_not_have(written):
    with pytest.raises(UserError, match=r"adapter: adapts blk\.0\.\S+, which the exported base"):
        written({"blk.0.attn_q.weight"})
