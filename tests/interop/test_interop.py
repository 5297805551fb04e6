"""Other programs load our exports and compute our logits.

They run in environments of their own; see `scripts/interop_environments.py`. `HQQTRAIN_INTEROP`
names the folder of these, and `HQQTRAIN_REAL_MODEL` the folder of a further model. The option
`--log-cli-level=INFO` shows the figures.

A program that computes in fp32 must find our logits. One that rounds more than we do is compared
twice: with our logits, and with what the same rounding does to them. The second comparison has a
narrow bound, which a small fault exceeds, too.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import model_export
from peft import get_peft_model, get_peft_model_state_dict
from quantized_models import TrainedModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtrain.api.folders import load_quantized
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.formats.base import WrittenModel
from hqqtrain.formats.exported_model import exported_model
from hqqtrain.formats.gguf.block_types import BlockType, choose_block_type
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
STORED_ERROR = {"Q8_0": 1e-2, "Q4_1": 1e-3, "Q4_K": 2e-2, "Q2_K": 5e-2}
"""Block type of GGUF -> the largest ||W' - W|| / ||W|| of a layer W that is stored as W'."""
TEXT = "def add(first, second):\n    return first + second\n\n\nclass Stack:\n    def push(self"


def _calibrated(folder: str, **quant: int) -> Path:
    """Quantize a model with text, as a run does, and return the folder of the quantized model.

    The folder is kept beside the environments, because this takes minutes.

    Below 4 bits, a model that is quantized without text is lost: the rounding of fp16 alone changes
    its logits more than a fault of an export would.
    """
    root = ENVIRONMENTS / "quantized"
    name = "-".join(map(str, [Path(folder).name, *quant.values()]))
    quantized = root / name / "quantized"
    if quantized.exists():
        return quantized
    words = [f"quant.{key}={value}" for key, value in quant.items()]
    subprocess.run(
        [sys.executable, "-m", "hqqtrain", "task=quantize", "recipe=tiny_2bit", *words,
         f"model.name_or_path={folder}", "quant.calibration_tokens=4096", "track.backends=[]",
         f"run.root={root}", f"run.name={name}"],
        check=True,
    )  # fmt: skip
    return quantized


def _quantized(folder: str, *, calibrated: bool, **quant) -> nn.Module:
    if calibrated and quant["nbits"] < 4:
        model = load_quantized(_calibrated(folder, **quant), dtype=torch.float32)
        del model.config.quantization_config  # an export says how its own format is quantized
        return model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_model(model, QuantConfig(**{"solver": "hqq", "calibration": None} | quant))
    return model


def _trained(folder: str, **quant) -> TrainedModel:
    """Return a quantized model with a random adapter.

    Its dense parameters are numbers that fp16 holds, so that no format rounds them.
    """
    torch.manual_seed(0)
    model = _quantized(folder, **quant)
    config = lora_config(AdapterConfig(r=8, alpha=16), model)
    model = get_peft_model(model, config).eval()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.02)
    for module in model.modules():
        if not isinstance(module, HQQLinear):
            for param in module.parameters(recurse=False):
                param.data = param.data.half().float()
    settings = fingerprinted(model)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    adapter = Adapter(config, state, settings.fingerprint)
    return TrainedModel(Path(folder), model, settings, adapter)


def _kl(ours: Tensor, theirs: Tensor) -> float:
    """Return KL(ours || theirs) in nats per token."""
    log_p, log_q = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two logits, as a share of the largest logit."""
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


class _Case:
    """A model that is exported to `folder`, and the logits of both."""

    exported: nn.Module
    """Our model with the layers that the export has stored."""

    def __init__(
        self, name: str, model: str, folder: Path, *, calibrated: bool = False, **quant
    ) -> None:
        self.trained = _trained(model, calibrated=calibrated, **quant)
        self.folder = folder / "export"
        self.tokens = AutoTokenizer.from_pretrained(model)(TEXT, return_tensors="pt").input_ids
        self.name = name
        np.save(folder / "tokens.npy", self.tokens.numpy())

    def write(self, **changes) -> None:
        def accept(written: WrittenModel) -> None:
            self.comparison = written.comparison
            self.exported = exported_model(self.trained.model, written.read_layer)

        FORMATS[self.name].write(model_export(self.trained, **changes), self.folder, accept)

    @torch.no_grad()
    def ours(self, model: nn.Module | None = None, *, adapted: bool = False) -> Tensor:
        model = model or self.trained.model
        if adapted:
            return model(self.tokens).logits
        with model.disable_adapter():
            return model(self.tokens).logits

    def block_type(self, module: str) -> BlockType:
        kind = choose_block_type(self.trained.settings.modules[module], "auto")
        assert kind is not None
        return kind

    def stored_errors(self) -> dict[str, float]:
        """Return the largest error of a layer, by the block type of GGUF that it is stored in."""
        errors: dict[str, float] = {}
        for layer in self.comparison.layers:
            kind = self.block_type(layer.name).name
            error = (layer.squared_error / layer.squared_norm) ** 0.5
            errors[kind] = max(error, errors.get(kind, 0))
        return errors

    @contextmanager
    def rounded_activations(self) -> Iterator[nn.Module]:
        """Yield the exported model with the inputs of quantized layers rounded as llama.cpp does.

        It rounds them to 8 bits, in blocks of 256 for the types of 256 weights, and of 32 for all
        others.
        """

        def rounding(block_size: int):
            def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                blocks = args[0].unflatten(-1, (-1, block_size))
                scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
                return ((blocks / scale).round().mul(scale).flatten(-2),)

            return rounded

        hooks = []
        for name in self.trained.settings.modules:
            linear = self.exported.get_submodule(f"base_model.model.{name}.base_layer")
            hook = rounding(self.block_type(name).block_size)
            hooks.append(linear.register_forward_pre_hook(hook))
        try:
            yield self.exported
        finally:
            for hook in hooks:
                hook.remove()

    def theirs(self, environment: str, *more: str) -> Tensor:
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
    """fp32 is our arithmetic; fp16 rounds scale and bias, and also every sum of a product."""
    case = _Case("mlx", model, tmp_path, calibrated=True, nbits=nbits, group_size=group_size)
    case.write(dtype=torch.float32, adapter_form="separate")
    found = _distance(case.ours(), case.theirs("mlx", "float32"))
    logger.info("fp32: %.1e", found)
    assert found < 1e-4
    case.write(adapter_form="separate")
    adapter, adapted = str(case.folder / "adapter"), case.ours(adapted=True)
    exported = case.ours(case.exported, adapted=True)
    stored = _distance(exported, case.theirs("mlx", "float32", adapter))
    rounding = _kl(adapted, exported)
    logger.info("with an adapter, scale and bias in fp16: %.1e, KL %.1e", stored, rounding)
    assert stored < 1e-4
    assert rounding < 1e-3
    kl = _kl(adapted, case.theirs("mlx", "float16", adapter))
    logger.info("all in fp16: KL %.1e", kl)
    assert kl < (2e-3 if nbits > 3 else 5e-2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("axis", "group_size"), [(1, 64), (0, 64), (1, 16)])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_hqq(tmp_path, nbits, axis, group_size, model):
    case = _Case("hqq", model, tmp_path, nbits=nbits, axis=axis, group_size=group_size)
    case.write(dtype=torch.float32)
    found = _distance(case.ours(), case.theirs("hqq"))
    logger.info("fp32: %.1e", found)
    assert found < 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("nbits", [8, 4])
def test_compressed_tensors(tmp_path, nbits, group_size, model):
    case = _Case("compressed-tensors", model, tmp_path, nbits=nbits, group_size=group_size,
                 zero="integer")  # fmt: skip
    case.write(dtype=torch.float32)
    found = _distance(case.ours(), case.theirs("compressed"))
    logger.info("fp32: %.1e", found)
    assert found < 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("nbits", "kl"), [(8, 5e-3), (4, 2e-2), (3, 2e-2), (2, 0.3)])
def test_llama_cpp(tmp_path, nbits, kl, model):
    """llama.cpp rounds activations to 8 bits, as we can; transformers reads its files exactly."""
    case = _Case("gguf", model, tmp_path, calibrated=True, nbits=nbits, group_size=64)
    case.write(adapter_form="separate")
    file, adapter = next(case.folder.glob("model*.gguf")), str(case.folder / "adapter.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        case.folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        stored = _distance(case.ours(case.exported), read(case.tokens).logits)
    logger.info("%s as transformers reads it: %.1e", file.name, stored)
    assert stored < 1e-5
    for kind, error in case.stored_errors().items():
        logger.info("%s: error of a layer %.2g", kind, error)
        assert error < STORED_ERROR[kind]
    for adapted in (False, True):
        ours, exported = case.ours(adapted=adapted), case.ours(case.exported, adapted=adapted)
        theirs = case.theirs("llamacpp", *[adapter] * adapted)[..., : ours.shape[-1]]
        told = theirs.isfinite().all(-1)  # all but those after which the text would end
        with case.rounded_activations() as model:
            rounded = case.ours(model, adapted=adapted)
        found = _kl(ours[told], theirs[told])
        arithmetic, own = (_kl(exported[told], x[told]) for x in (theirs, rounded))
        which = "with" if adapted else "without"
        logger.info(
            "%s an adapter: KL %.1e; from what is stored %.1e, ours with 8-bit activations %.1e",
            which, found, arithmetic, own,
        )  # fmt: skip
        assert found < kl
        assert arithmetic < 2 * own
    if nbits == 8:
        case.write(adapter_form="merge")
        theirs = case.theirs("llamacpp")[..., : ours.shape[-1]]
        assert _kl(ours[told], theirs[told]) < kl
