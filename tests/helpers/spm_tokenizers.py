"""Small tokenizers of SentencePiece's kind, as tokenizer.json has them for Llama 2 and Gemma."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the quick brown fox jumps over the lazy dog", "a  thing  that    the  fox  does"] * 20
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def save_spm_tokenizer(folder: Path, *, prefix: bool = True) -> PreTrainedTokenizerFast:
    """Train a tokenizer, save it to `folder`, and return it. A text begins with `<s>`.

    Args:
        folder: The folder to write to.
        prefix: Whether a space is put before a text, as in Llama 2 and not in Gemma.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    # The trainer has made the bytes special, which they are not in files of SentencePiece.
    model = tokenizer.model
    clean = Tokenizer(model)
    clean.normalizer, clean.decoder = tokenizer.normalizer, tokenizer.decoder
    clean.add_special_tokens(["<unk>", "<s>", "</s>"])
    clean.add_tokens([AddedToken(token, normalized=False) for token in (SPACE * 2, "==>")])
    clean.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=clean, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast
