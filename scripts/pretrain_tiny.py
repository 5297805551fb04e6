"""Train the bundled tiny Llama from installed Python sources, on one GPU.

    python scripts/pretrain_tiny.py --out hqqtrain/models/tiny --steps 8000

Why a model of our own: the default recipe must run without a network, and its perplexity
must react to quantization as a large model's does. So the model is trained long (more than
100 tokens per parameter), because an undertrained one quantizes too easily. What the recipe
measures on, the held-out standard-library modules, never enters training, nor does any
package's copy of them: see `clean_corpus`.
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
"""A file that shares this many consecutive lines with a held-out module is left out."""


def tiny_config() -> LlamaConfig:
    """5.8 M parameters: grouped-query attention, tied embeddings, widths divisible by 128."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip


def windows(text: str) -> Iterator[int]:
    """Hashes of every run of WINDOW consecutive non-blank lines, white space stripped."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for start in range(len(lines) - WINDOW + 1):
        yield hash(tuple(lines[start : start + WINDOW]))


def package_sources(limit: int) -> Iterator[tuple[str, str]]:
    """(dotted name, text) of installed packages' sources, at most `limit` characters a file."""
    for root in map(Path, {*site.getsitepackages(), *map(str, Path("/").glob("usr/lib/python3"))}):
        for path in sorted(root.rglob("*.py")):
            if 200 < path.stat().st_size < limit:
                text = path.read_text(encoding="utf-8", errors="ignore")
                yield ".".join(path.relative_to(root).with_suffix("").parts), text


def clean_corpus(sources: Iterable[tuple[str, str]]) -> list[str]:
    """Texts that are no copy, by name or by content, of a held-out module; no duplicates."""
    held_out = {w for _, text in stdlib_texts("held_out") for w in windows(text)}
    seen: set[int] = set()
    kept = []
    for name, text in sources:
        tail = name.removesuffix(".__init__").split(".")[-1]
        if is_held_out(tail) and tail in sys.stdlib_module_names:
            continue
        if hash(text) in seen or not held_out.isdisjoint(windows(text)):
            continue
        seen.add(hash(text))
        kept.append(text)
    return kept


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with runs of spaces as in code; `<|endoftext|>` is token 0."""
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
    """All texts as one uint16 stream, `<|endoftext|>` after each."""
    encodings = tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array([*e.ids, 0], np.uint16) for e in encodings])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, cosine to a hundredth of the peak."""
    warmup = max(1, steps // 50)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    decay = 0.01 + 0.495 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup) * decay


def batches(stream: np.ndarray, size: int, seed: int) -> Iterator[torch.Tensor]:
    """int64 [size, SEQUENCE + 1], random windows, on the GPU."""
    tokens = torch.from_numpy(stream.astype(np.int16)).cuda()  # 4096 < 2^15
    generator = torch.Generator("cuda").manual_seed(seed)
    offsets = torch.arange(SEQUENCE + 1, device="cuda")
    while True:
        high = len(tokens) - SEQUENCE - 1
        start = torch.randint(high, (size, 1), generator=generator, device="cuda")
        yield tokens[start + offsets].long()


def optimizer_for(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss, nats."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(model: LlamaForCausalLM, stream: np.ndarray, args: argparse.Namespace) -> int:
    """Runs `args.steps` steps, or to `args.minutes`, whose share of time drives the schedule."""
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
            began = time.time()  # compiled by now
        if step % 500 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - began:.0f} s", flush=True)
        progress = (time.time() - began) / 60 / args.minutes if args.minutes else step / args.steps
        if progress >= 1 and step > 20:
            break
    return step * args.batch * SEQUENCE


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Tokenizer) -> float:
    """Mean next-token loss over all held-out modules, nats."""
    stream = encode(tokenizer, [text for _, text in stdlib_texts("held_out")])
    rows = len(stream) // (SEQUENCE + 1)
    data = torch.from_numpy(stream[: rows * (SEQUENCE + 1)].astype(np.int64)).view(rows, -1).cuda()
    return sum(loss_of(model, part).item() * len(part) for part in data.split(64)) / rows


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """config.json, tokenizer files and one bf16 safetensors file, tied embedding once."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=2048
    ).save_pretrained(out)
    state = {k: v.to(torch.bfloat16).contiguous().cpu() for k, v in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=0, help="train for a time instead")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--file-limit", type=int, default=400_000, help="longest file, bytes")
    parser.add_argument("--corpus", type=float, default=300, help="millions of characters")
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

    model = LlamaForCausalLM(tiny_config()).cuda()
    tokens = train(model, stream, args)
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": round(tokens / parameters, 1),
        "corpus_tokens": len(stream),
        "held_out_perplexity": round(math.exp(held_out_loss(model, tokenizer)), 4),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    save(model, tokenizer, args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
