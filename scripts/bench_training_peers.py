"""A peer of `bench_training.py`: train LoRA adapters with another tool, without an end.

    python bench_training_peers.py unsloth MODEL_FOLDER LINES.jsonl 4 2048 full

It writes a line of JSON for every step. The weights are random, and saved in the folder of the
model once, because these tools load a model from files.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_unsloth(folder: Path, tokens: int, checkpointing: str) -> Any:
    """Return a model of Unsloth in nf4."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    from unsloth import FastLanguageModel  # before torch: it changes other packages

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=tokens, load_in_4bit=True, dtype=None
    )
    ways = {"none": False, "full": True, "offload": "unsloth"}
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none",
        use_gradient_checkpointing=ways[checkpointing],
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    return model


def load_bitsandbytes(folder: Path, tokens: int, checkpointing: str) -> Any:
    """Return a model of transformers and PEFT, with bitsandbytes' nf4."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cuda", quantization_config=quantization
    )
    model.config.use_cache = False
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))


PEERS: dict[str, Callable[[Path, int, str], Any]] = {
    "unsloth": load_unsloth, "bnb": load_bitsandbytes,
}  # fmt: skip


def save_weights(folder: Path) -> None:
    """Save random weights of the model that the folder describes, unless it has some."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if list(folder.glob("*.safetensors")):
        return
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def main(peer: str, folder: Path, lines: Path, batch: int, tokens: int, checkpointing: str) -> None:
    """Train without an end. The batch is the same in each step."""
    model = PEERS[peer](folder, tokens, checkpointing)
    import torch

    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(10, model.config.vocab_size, (batch, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with lines.open("a") as file:
        while True:
            torch.cuda.synchronize()
            started = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            row = {
                "train/loss": loss.item(),
                "train/tokens_per_second": batch * tokens / (time.perf_counter() - started),
                "memory/peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    name, model_folder, output, sequences, length, way = sys.argv[1:]
    if name == "save":  # in a process of its own, so that Unsloth is imported before all others
        save_weights(Path(model_folder))
    else:
        main(name, Path(model_folder), Path(output), int(sequences), int(length), way)
