"""The installed hqq loads what is written, and dequantizes the same weights."""

import json

import pytest
import torch
from exports import layers, stored_tensors, write_export
from hqq.core.quantize import HQQLinear

from hqqtrain.common.errors import UserError
from hqqtrain.formats.registry import check_format


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize(("axis", "group_size"), [(1, 16), (0, 16), (1, None)])
def test_hqq_dequantizes_the_same_weights(make_trained, tmp_path, nbits, axis, group_size):
    trained = make_trained("qwen2", nbits=nbits, axis=axis, group_size=group_size)
    written = write_export(trained, "hqq", tmp_path / "hqq")
    stored = stored_tensors(tmp_path / "hqq")
    dtype = torch.float32 if nbits == 8 else torch.bfloat16
    for name, layer in layers(trained).items():
        prefix = f"{name}."
        state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        theirs = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
        theirs.load_state_dict(state)
        meta = theirs.meta
        assert (meta["nbits"], meta["axis"], meta["compute_dtype"]) == (nbits, axis, dtype)
        meta["compute_dtype"], meta["scale"] = torch.float32, meta["scale"].float()
        meta["zero"] = meta["zero"].float()
        assert torch.equal(theirs.dequantize().float(), layer.dequantize(torch.float32))
        assert (theirs.bias is None) == (layer.bias is None)
    assert written.comparison.counts["exact"] == len(written.comparison.layers)


def test_the_folder_is_one_of_transformers_4(make_trained, tmp_path):
    """transformers up to 4.57 reads these keys; test_interop loads the folder with it."""
    trained = make_trained(nbits=4, group_size=16)
    write_export(trained, "hqq", tmp_path / "hqq")
    config = json.loads((tmp_path / "hqq" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "hqq"
    assert quantization["skip_modules"] == ["lm_head"]
    assert quantization["quant_config"]["weight_quant_params"]["nbits"] == 4
    assert quantization["quant_config"]["offload_meta"] is False
    tokenizer = json.loads((tmp_path / "hqq" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] != "TokenizersBackend"


def test_what_hqq_cannot_pack(make_trained):
    trained = make_trained(nbits=1, axis=0, group_size=4)
    with pytest.raises(UserError, match=r"of which hqq packs 8 into one byte at 1 bits\. Use"):
        check_format("hqq", trained.settings, trained.hf_config)
