"""Train the bundled tiny Llama from installed Python sources, on one GPU.

    python scripts/pretrain_tiny.py --out hqqtrain/models/tiny --steps 8000

The default recipe needs a model of our own because it must run without a network, and because
quantization must affect its perplexity as it affects that of a large model. An undertrained model
quantizes too easily, so this one is trained for long (more than 100 tokens per parameter). The
recipe evaluates on the held-out modules of the standard library. Neither they nor copies of them in
installed packages are trained on: see `clean_corpus`.
"""

import argparse
import json
import math
import site
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hqqtrain.data.stdlib import is_held_out, stdlib_texts

EOS, VOCABULARY, SEQUENCE = "<|endoftext|>", 4096, 512
WINDOW = 5
"""A file that shares this many consecutive lines with a held-out module is excluded."""


def tiny_config() -> LlamaConfig:
    """Return the configuration of the model.

    It has 5.8 M parameters, grouped-query attention, tied embeddings and widths divisible by 128.
    """
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=SEQUENCE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def windows(text: str) -> Iterator[int]:
    """Yield a hash of every WINDOW consecutive non-blank lines, with white space stripped."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - WINDOW + 1):
        yield hash(tuple(lines[start : start + WINDOW]))


def package_sources(limit: int) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of the source files of installed packages below `limit` bytes."""
    for root in map(Path, {*site.getsitepackages(), *map(str, Path("/").glob("usr/lib/python3"))}):
        for path in sorted(root.rglob("*.py")):
            if 200 < path.stat().st_size < limit:
                text = path.read_text(encoding="utf-8", errors="ignore")
                yield ".".join(path.relative_to(root).with_suffix("").parts), text


def clean_corpus(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Return the texts without duplicates, and without copies of held-out modules.

    A copy has the name of a held-out module or shares WINDOW consecutive lines with one.
    """
    held_out = {w for _, text in stdlib_texts("held_out") for w in windows(text)}
    seen: set[int] = set()
    kept = []
    for name, text in sources:
        last_part = name.removesuffix(".__init__").split(".")[-1]
        if is_held_out(last_part) and last_part in sys.stdlib_module_names:
            continue
        if hash(text) in seen or not held_out.isdisjoint(windows(text)):
            continue
        seen.add(hash(text))
        kept.append(text)
    return kept


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that can merge runs of spaces, as code has them.

    `<|endoftext|>` is token 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return all texts as one uint16 stream of tokens, with `<|endoftext|>` after each text."""
    encodings = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array([*e.ids, 0], np.uint16) for e in encodings])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate at `step`: linear warm-up over 2 %, then cosine to a hundredth of `peak`."""
    warmup = max(1, steps // 50)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    decay = 0.01 + 0.495 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * decay


def batches(stream: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield random windows of the stream, int64 [size, SEQUENCE + 1] on the GPU, without end."""
    tokens = torch.from_numpy(stream.astype(np.int16)).cuda()  # 4096 < 2^15
    generator = torch.Generator("cuda").manual_seed(seed)
    offsets = torch.arange(SEQUENCE + 1, device="cuda")
    while True:
        high = len(tokens) - SEQUENCE - 1
        start = torch.randint(high, (size, 1), generator=generator, device="cuda")
        yield tokens[start + offsets].long()


def optimizer_for(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss in nats, for a batch [n, SEQUENCE + 1]."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(model: LlamaForCausalLM, stream: np.ndarray, args: argparse.Namespace) -> int:
    """Train for `args.steps` steps, or for `args.minutes` minutes if that is not 0.

    The learning rate follows the share of steps, or of the time, that has passed.

    Returns:
        The number of tokens trained on.
    """
    step_loss = torch.compile(loss_of, dynamic=False)
    optimizer = optimizer_for(model, args.lr)
    began, progress, step = time.time(), 0.0, 0
    for step, batch in enumerate(batches(stream, args.batch, seed=0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(int(progress * 10000), 10000, args.lr)
        loss = step_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 20:
            began = time.time()  # do not count the compilation
        if step % 500 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
        progress = (time.time() - began) / 60 / args.minutes if args.minutes else step / args.steps
        if progress >= 1 and step > 20:
            break
    return step * args.batch * SEQUENCE


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer) -> float:
    """Return the mean next-token loss over all held-out modules, in nats."""
    stream = encode(tokenizer, [text for _, text in stdlib_texts("held_out")])
    rows = len(stream) // (SEQUENCE + 1)
    data = torch.from_numpy(stream[: rows * (SEQUENCE + 1)].astype(np.int64)).view(rows, -1).cuda()
    return sum(loss_of(model, part).item() * len(part) for part in data.split(64)) / rows


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Save config.json, the tokenizer and one bf16 safetensors file without the tied head."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=SEQUENCE
    ).save_pretrained(out)
    state = {k: v.to(torch.bfloat16).contiguous().cpu() for k, v in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Build the corpus, train the tokenizer and the model, evaluate and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument(
        "--minutes", type=float, default=0, help="train for this long instead of --steps"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--file-limit", type=int, default=400_000, help="upper limit of a file, in bytes"
    )
    parser.add_argument(
        "--corpus",
        type=float,
        default=300,
        help="millions of characters of package sources, at most",
    )
    parser.add_argument("--stdlib-repeats", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    library = clean_corpus(stdlib_texts("train"))
    packages = clean_corpus(package_sources(args.file_limit))
    np.random.default_rng(0).shuffle(packages)
    share = args.corpus * 1e6 / max(1, sum(map(len, packages)))
    packages = packages[: int(len(packages) * min(1, share))]
    tokenizer = train_tokenizer(library + packages[:: max(1, len(packages) // 4000)])
    stream = encode(tokenizer, library * args.stdlib_repeats + packages)
    print(f"{len(library)} + {len(packages)} files, {len(stream) / 1e6:.1f} M tokens", flush=True)

    model = LlamaForCausalLM(tiny_config())
    torch.nn.Module.cuda(model)
    tokens = train(model, stream, args)
    parameters = sum(p.numel() for p in model.parameters())
    summary = {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / parameters, 1),
        "corpus_tokens": len(stream),
        "held_out_perplexity": round(math.exp(held_out_loss(model, tokenizer)), 4),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    save(model, tokenizer, args.out)
    (args.out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
