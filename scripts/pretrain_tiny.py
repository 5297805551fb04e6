"""Train a small Llama from installed Python sources, on one GPU.

    python scripts/pretrain_tiny.py --out hqqtrain/models/tiny
    python scripts/pretrain_tiny.py --out FOLDER --size 16m --minutes 6

The first command makes the bundled model, the second the model of 16.8 M parameters with which
solvers are compared. The default recipe needs a model of our own because it must run without a
network, and because quantization must affect its perplexity as it affects that of a large model. An
undertrained model quantizes too easily, so it is trained for long (more than 100 tokens per
parameter). The recipe evaluates on the held-out modules of the standard library. Neither they nor
copies of them in installed packages are trained on.

The corpus is the standard library and the installed packages under a permissive license, see
`pretrain_corpus.py`. `training.json` has the number of files under each license.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretrain_corpus import EOS, build_corpus, encode

from hqqtrain.data.stdlib import stdlib_texts

SEED = 0


@dataclass(frozen=True)
class Size:
    """A model and how long it is trained; `batch` is in sequences, `context` in tokens.

    All widths are divisible by 128. Heads have 64 dimensions, and two of them share a key and a
    value, or four. Embeddings are tied.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    lr: float

    def config(self) -> LlamaConfig:
        """Return the configuration of the model."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            intermediate_size=self.intermediate, num_attention_heads=self.heads,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip


SIZES = {
    "tiny": Size(4096, 256, 768, 6, 4, context=512, batch=256, steps=8000, lr=3e-3),
    "16m": Size(2048, 512, 1280, 6, 8, context=1024, batch=96, steps=6144, lr=2e-3),
}
"""The bundled model of 5.8 M parameters, and one of 16.8 M that is trained on at most 604 M.

A vocabulary of 2,048 leaves 15.7 M of these parameters to the quantized linear layers.
"""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate at `step`: linear warm-up over 2 %, then cosine to a hundredth of `peak`."""
    warmup = max(1, steps // 50)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    decay = 0.01 + 0.495 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * decay


def batches(stream: np.ndarray, size: Size, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield random windows of the stream, int64 [batch, context + 1] on `device`, without end.

    The whole stream is on the device, as int16, because no vocabulary has more than 2^15 tokens.
    """
    tokens = torch.from_numpy(stream.astype(np.int16)).to(device)
    generator = torch.Generator(device).manual_seed(SEED)
    offsets = torch.arange(size.context + 1, device=device)
    while True:
        high = len(tokens) - size.context - 1
        start = torch.randint(high, (size.batch, 1), generator=generator, device=device)
        yield tokens[start + offsets].long()


def optimizer_for(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats, for a batch [n, context + 1]."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(model: LlamaForCausalLM, stream: np.ndarray, size: Size, minutes: float) -> int:
    """Train for `size.steps` steps, but for at most `minutes` minutes if that is not 0.

    The learning rate follows the share of steps or of the time that has passed, whichever is
    larger. So a run that the time limit ends has had its decay, too.

    Returns:
        The number of tokens trained on.
    """
    on_gpu = model.device.type == "cuda"
    step_loss = torch.compile(loss_of, dynamic=False) if on_gpu else loss_of
    optimizer = optimizer_for(model, size.lr)
    began, progress, step = time.time(), 0.0, 0
    for batch in batches(stream, size, model.device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(int(progress * 10000), 10000, size.lr)
        loss = step_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
        step += 1
        elapsed = (time.time() - began) / 60
        progress = max(step / size.steps, elapsed / minutes if minutes else 0.0)
        if progress >= 1:
            break
    return step * size.batch * size.context


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, context: int) -> float:
    """Return the mean next-token loss over all held-out modules, in nats."""
    stream = encode(tokenizer, [text for _, text in stdlib_texts("held_out")])
    rows = len(stream) // (context + 1)
    data = torch.from_numpy(stream[: rows * (context + 1)].astype(np.int64)).view(rows, -1)
    parts = data.to(model.device).split(32)
    return sum(loss_of(model, part).item() * len(part) for part in parts) / rows


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Save config.json, the tokenizer and one bf16 safetensors file without the tied head."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(out)
    state = {k: v.to(torch.bfloat16).contiguous().cpu() for k, v in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", {"format": "pt"})


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--size", choices=SIZES, default="tiny")
    add("--steps", type=int, help="instead of those of the size")
    add("--minutes", type=float, default=0, help="end after this long at the latest; 0: no limit")
    add("--batch", type=int, help="sequences, instead of those of the size")
    add("--file-limit", type=int, default=400_000, help="upper limit of a file, in bytes")
    add("--corpus", type=float, default=300, help="most millions of characters from packages")
    add("--stdlib-repeats", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    """Build the corpus, train the tokenizer and the model, evaluate and save them."""
    args = parse_arguments()
    size = SIZES[args.size]
    size = replace(size, steps=args.steps or size.steps, batch=args.batch or size.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")

    licenses: Counter[str] = Counter()
    tokenizer, stream = build_corpus(
        size.vocabulary, args.stdlib_repeats, args.corpus * 1e6, args.file_limit, licenses
    )
    model = LlamaForCausalLM(size.config())
    torch.nn.Module.to(model, device)
    tokens = train(model, stream, size, args.minutes)
    save(model, tokenizer, args.out)
    print("measuring the perplexity of the held-out modules, minutes without a GPU", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    summary = {
        "size": args.size,
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / parameters, 1),
        "corpus_tokens": len(stream),
        "held_out_perplexity": round(math.exp(held_out_loss(model, tokenizer, size.context)), 4),
        "package_files_by_license": dict(licenses.most_common()),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
