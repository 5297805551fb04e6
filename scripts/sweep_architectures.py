"""Try the product on a small model of every causal architecture that transformers has.

For each architecture the script saves a small random model, quantizes it to 4 bits, trains one
step of a LoRA adapter and evaluates it, all in this process. It then computes with transformers
alone, one text at a time, what the product has computed in batches:

- `eval`: the perplexity of the full-precision model, relative difference;
- `train`: the loss of one global batch as the loader arranges it, relative difference.

The table has one line for each architecture: trained with texts that share a row (packed) or have
rows of their own (rows), refused with the message, FAILED, or untried, if transformers has no small
model of it to try. The exit code is 1 if a line says FAILED.

    python scripts/sweep_architectures.py                    all architectures, about 10 minutes
    python scripts/sweep_architectures.py llama opt mamba2   some of them
"""

import contextlib
import io
import json
import logging
import math
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.compose.command import compose_command
from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.packing import pack_examples
from hqqtrain.models import small_copy
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.causal_lm import next_token_outputs
from hqqtrain.models.packing_probe import probe_packing
from hqqtrain.models.small_copy import small_copies
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks.run import run_task

TEXTS = (
    "the quick brown fox jumps over a lazy dog " * 3,
    "def value(self): return list of data " * 2,
    "import class true print self list " * 4,
)
HELD_OUT = ("a lazy dog may print the value of a list " * 4, "return none while data jumps " * 2)
MAX_SEQ_LEN = 128
VOCABULARY = 4096  # of the bundled tokenizer
TOLERANCE = 1e-3
"""Largest relative difference between the product's figures and those of transformers alone."""

ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
    "megatron-bert", "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm",
    "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Architectures that are causal only as decoders."""

SETTINGS: dict[str, dict[str, Any]] = {
    **{model_type: {"is_decoder": True} for model_type in ENCODERS},
    "xlm": {"causal": True},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2,
             "num_hidden_layers": 8},
    "glm4_moe": {"head_dim": 128},
    "falcon_h1": {"mamba_d_head": 64, "mamba_n_heads": 32, "mamba_d_ssm": 2048},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}  # fmt: skip
"""Settings without which an architecture is not causal, or cannot be built, by default."""


@dataclass
class Outcome:
    """One line of the table."""

    model_type: str
    status: str
    message: str = ""
    eval_difference: float = math.nan
    train_difference: float = math.nan
    seconds: float = 0.0

    def __str__(self) -> str:
        figures = f"{self.eval_difference:9.1e} {self.train_difference:9.1e} {self.seconds:5.0f}s"
        return f"{self.model_type:26} {self.status:10} {figures}  {self.message}"


def save_small_model(model_type: str, folder: Path) -> PreTrainedModel | None:
    """Save a small random model with the bundled tokenizer, and return it; None if none works."""
    try:
        config = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    except Exception:  # some configurations have no defaults, each with an error of its own
        return None
    for small in small_copies(config, build_meta(config)):
        for name, value in [*vars(small.config).items()]:
            if "vocab" in name and value == small_copy.VOCABULARY:
                setattr(small.config, name, VOCABULARY)
        torch.manual_seed(0)
        # Not all small configurations are consistent enough to be saved, or have layers that run.
        with contextlib.suppress(Exception):
            model = type(small)(small.config).float().eval()
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    torch.nn.init.normal_(parameter, 0, 1 / parameter.shape[-1] ** 0.5)
            tokens = torch.arange(VOCABULARY - 20, VOCABULARY)[None]
            assert model(input_ids=tokens, use_cache=False).logits.shape[-1] >= VOCABULARY
            model.save_pretrained(folder)
            load_hf_config(folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TINY_FOLDER / file, folder)
            return model
    return None


@torch.no_grad()
def mean_loss(model: PreTrainedModel, texts: tuple[str, ...]) -> float:
    """Return the loss of the texts by transformers alone, each by itself."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    losses: list[Tensor] = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), ids[0, 1:], reduction="none"))
    return torch.cat(losses).double().mean().item()


@torch.no_grad()
def loader_loss(model: PreTrainedModel) -> tuple[float, bool]:
    """Return the loss of the training texts as the loader arranges them, and whether it packs."""
    probe = probe_packing(model.config, model)
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    sequences = pack_examples(TEXTS, tokenizer, max_seq_len=10 * MAX_SEQ_LEN).sequences
    config = TrainConfig(global_batch_size=1, max_seq_len=10 * MAX_SEQ_LEN)
    loader = PackedLoader(sequences, config, layout=BatchLayout(probe.is_isolated))
    total, count = 0.0, 0
    for batch in loader.batches(0):
        logits, labels = next_token_outputs(model, batch)
        total += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count, probe.is_isolated


def run_product(folder: Path, model: Path, skip: str) -> float:
    """Run `task=finetune` and return the perplexity of the full-precision model."""
    arguments = [
        f"model.name_or_path={model}", f"run.root={folder}", "run.name=run", "track.backends=[]",
        f"data.source={folder / 'train'}", f"eval.source={folder / 'held'}", "quant.nbits=4",
        f"train.max_seq_len={MAX_SEQ_LEN}", "train.max_steps=1", "train.global_batch_size=2",
        "quant.group_size=null", "train.precision=fp32", skip,
    ]  # fmt: skip
    command = compose_command(arguments, False)
    run_task(command.jobs[0].config, arguments)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return float(summary["eval"]["full_precision"]["perplexity"])


def run_as_advised(folder: Path, model: Path) -> float:
    """Run the product, with other values of `quant.skip` if a message advises them."""
    skip = "quant.skip=[lm_head]"
    while True:
        try:
            return run_product(folder, model, skip)
        except UserError as error:
            advised = re.search(r"quant\.skip='(\[.*?\])'", str(error))
            if advised is None or skip == f"quant.skip={advised[1]}":
                raise
            skip = f"quant.skip={advised[1]}"


def try_architecture(model_type: str, folder: Path) -> Outcome:
    """Save, quantize, train and evaluate a small model of one architecture."""
    for name, texts in (("train", TEXTS), ("held", HELD_OUT)):
        (folder / name).mkdir()
        for index, text in enumerate(texts):
            (folder / name / f"{index}.txt").write_text(text)
    outcome = Outcome(model_type, "")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model = save_small_model(model_type, folder / "model")
            if model is None:
                return Outcome(
                    model_type, "untried", "no small model of it can be saved and called"
                )
            loss, packs = loader_loss(model)
            outcome.train_difference = abs(loss / mean_loss(model, TEXTS) - 1)
            held_out_loss = mean_loss(model, HELD_OUT)
            perplexity = run_as_advised(folder, folder / "model")
            outcome.eval_difference = abs(math.log(perplexity) / held_out_loss - 1)
        outcome.status = "packed" if packs else "rows"
        if not max(outcome.eval_difference, outcome.train_difference) <= TOLERANCE:
            outcome.status, outcome.message = "FAILED", "not the figures of transformers alone"
    except UserError as error:
        outcome.status, outcome.message = "refused", " ".join(str(error).split())
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        outcome.status, outcome.message = "FAILED", f"{where} {describe_error(error)}"
    return outcome


def main(model_types: list[str]) -> int:
    """Print the table and return the exit code."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.captureWarnings(True)
    print(f"{'model_type':26} {'status':10} {'eval':>9} {'train':>9}   time  message")
    counts: dict[str, int] = {}
    for model_type in model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = try_architecture(model_type, Path(folder))
        outcome.seconds = time.perf_counter() - started
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
        print(outcome, flush=True)
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return int("FAILED" in counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
