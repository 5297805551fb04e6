"""Other programs load our exports and compute our logits.

They run in environments of their own; see `scripts/interop_environments.py`. `HQQTRAIN_INTEROP`
names the folder of these, and `HQQTRAIN_REAL_MODEL` the folder of a further model. The option
`--log-cli-level=INFO` shows the figures.
"""

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import model_export
from peft import get_peft_model, get_peft_model_state_dict
from quantized_models import TrainedModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.formats.packed import fingerprinted
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.registry import FORMATS
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model

logger = logging.getLogger(__name__)

ENVIRONMENTS = Path(os.environ.get("HQQTRAIN_INTEROP", "environments")).absolute()
PROGRAMS = Path(__file__).parent / "programs"
MODELS = [str(TINY_FOLDER), *filter(None, [os.environ.get("HQQTRAIN_REAL_MODEL")])]
TEXT = "def add(first, second):\n    return first + second\n\n\nclass Stack:\n    def push(self"


def _trained(folder: str, **quant) -> TrainedModel:
    """Return a quantized model with a random adapter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_model(model, QuantConfig(**{"solver": "hqq", "calibration": None} | quant))
    config = lora_config(AdapterConfig(r=8, alpha=16), model)
    model = get_peft_model(model, config).eval()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.02)
    settings = fingerprinted(model)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    adapter = Adapter(config, state, settings.fingerprint)
    return TrainedModel(Path(folder), model, settings, adapter)


@contextmanager
def _rounded_activations(model: nn.Module) -> Iterator[None]:
    """Round what quantized linears get to 8 bits, in blocks of 32, as llama.cpp's Q8_0 does."""

    def rounded(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        blocks = args[0].unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((blocks / scale).round().mul(scale).flatten(-2),)

    linears = [module for module in model.modules() if isinstance(module, HQQLinear)]
    hooks = [linear.register_forward_pre_hook(rounded) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return KL(ours || theirs) in nats per token."""
    log_p, log_q = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


class _Case:
    """A model that is exported to `folder`, and the logits of both."""

    def __init__(self, name: str, model: str, folder: Path, **quant) -> None:
        self.trained, self.folder = _trained(model, **quant), folder / "export"
        self.tokens = AutoTokenizer.from_pretrained(model)(TEXT, return_tensors="pt").input_ids
        self.name = name
        np.save(folder / "tokens.npy", self.tokens.numpy())

    def write(self, **changes) -> None:
        FORMATS[self.name].write(model_export(self.trained, **changes), self.folder)

    @torch.no_grad()
    def ours(self, *, adapted: bool = False) -> torch.Tensor:
        if adapted:
            return self.trained.model(self.tokens).logits
        with self.trained.model.disable_adapter():
            return self.trained.model(self.tokens).logits

    def theirs(self, environment: str, *more: str) -> torch.Tensor:
        python = ENVIRONMENTS / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"{python} is missing: run scripts/interop_environments.py")
        program = next(PROGRAMS.glob(f"{environment}_*.py"))
        files = [str(self.folder.parent / name) for name in ("tokens.npy", "logits.npy")]
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [python, program, self.folder, *files, *more], capture_output=True, text=True,
            env=variables | {"HF_HUB_OFFLINE": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.from_numpy(np.load(files[1]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_mlx(tmp_path, nbits, group_size, model):
    """fp32 is our arithmetic; fp16 rounds scale, bias and activations."""
    case = _Case("mlx", model, tmp_path, nbits=nbits, group_size=group_size)
    case.write(dtype=torch.float32, adapter_form="separate")
    adapter = str(case.folder / "adapter")
    scale = case.ours().abs().max().item()
    assert (case.ours() - case.theirs("mlx")).abs().max() < 1e-4 * scale
    assert (case.ours(adapted=True) - case.theirs("mlx", adapter)).abs().max() < 1e-4 * scale
    case.write(adapter_form="separate")
    kl = _kl(case.ours(adapted=True), case.theirs("mlx", adapter))
    logger.info("KL in fp16 with an adapter: %.1e", kl)
    assert kl < (2e-3 if nbits > 3 else 5e-2)  # in a model that is nearly lost, differences grow


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("axis", "group_size"), [(1, 64), (0, 64), (1, 16)])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_hqq(tmp_path, nbits, axis, group_size, model):
    case = _Case("hqq", model, tmp_path, nbits=nbits, axis=axis, group_size=group_size)
    case.write(dtype=torch.float32)
    theirs, scale = case.theirs("hqq"), case.ours().abs().max().item()
    assert (case.ours() - theirs).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("nbits", [8, 4])
def test_compressed_tensors(tmp_path, nbits, group_size, model):
    case = _Case("compressed-tensors", model, tmp_path, nbits=nbits, group_size=group_size,
                 zero="integer")  # fmt: skip
    case.write(dtype=torch.float32)
    theirs, scale = case.theirs("compressed"), case.ours().abs().max().item()
    assert (case.ours() - theirs).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("nbits", "kl"), [(8, 5e-3), (4, 2e-2), (3, 2e-2), (2, 0.3)])
def test_llama_cpp(tmp_path, nbits, kl, model):
    """llama.cpp rounds activations to 8 bits, which alone costs about 1e-3."""
    case = _Case("gguf", model, tmp_path, nbits=nbits, group_size=64)
    case.write(adapter_form="separate")
    adapter = str(case.folder / "adapter.gguf")
    for adapted in (False, True):
        ours = case.ours(adapted=adapted)
        theirs = case.theirs("llamacpp", *[adapter] * adapted)[..., : ours.shape[-1]]
        told = theirs.isfinite().all(-1)  # all but those after which the text would end
        found = _kl(ours[told], theirs[told])
        with _rounded_activations(case.trained.model):
            rounded = _kl(ours[told], case.ours(adapted=adapted)[told])
        which = "with" if adapted else "without"
        logger.info(
            "KL %s an adapter: %.1e, ours with 8-bit activations %.1e", which, found, rounded
        )
        assert found < kl
    if nbits == 8:
        case.write(adapter_form="merge")
        theirs = case.theirs("llamacpp")[..., : ours.shape[-1]]
        assert _kl(ours[told], theirs[told]) < kl
