"""The model card (README.md) of an adapter: its base, and how to load it."""

import json
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.formats.signed_card import signed_card


@dataclass(frozen=True)
class AdapterCard:
    """The content of a model card: the base, its quantization, and the results of the training.

    Attributes:
        base: The hub name or folder of the full-precision model.
        fingerprint: The fingerprint of the base.
        nbits: Bits of a code; None: the base is not quantized, and has no other settings either.
        group_size: Weights that share a scale; None: a whole row or column.
        calibration: Name of the data that the base was calibrated with; None: without text.
        calibration_tokens: Tokens of that text.
        metrics: Name -> value of the results, as the card shows them.
        measured_by: Text and protocol of the figures, as Markdown; empty if there are none.
        best_step: The optimizer step that was chosen for its loss; None: the last one.
        has_new_tokens: Whether the embeddings of new tokens are trained.
        has_tokenizer: Whether a tokenizer is saved with the adapter.
        has_saved_base: Whether the quantized base is saved, so that the adapter can name it.
    """

    base: str
    fingerprint: str
    nbits: int | None
    group_size: int | None
    axis: int | None
    solver: str | None
    bits_per_weight: float
    calibration: str | None = None
    calibration_tokens: int | None = None
    revision: str | None = None
    metrics: dict[str, float] | None = None
    measured_by: str = ""
    best_step: int | None = None
    has_new_tokens: bool = False
    has_tokenizer: bool = False
    has_saved_base: bool = True


def render_card(card: AdapterCard) -> str:
    """Return the model card as Markdown, with the front matter that the hub reads.

    It is signed, so that `hub.push` replaces it by a card for the readers of the hub, unless the
    user has edited it.
    """
    revision = f" at revision `{card.revision}`" if card.revision else ""
    # The hub accepts nothing but a hub name as `base_model`.
    is_hub_name = card.base.count("/") == 1 and not Path(card.base).expanduser().exists()
    base_line = f"base_model: {json.dumps(card.base)}\n" if is_hub_name else ""
    step = ""
    if card.best_step is not None:
        step = (
            f"It is the adapter after optimizer step {card.best_step}, which had the lowest loss\n"
            "on held-out text (`ckpt.load_best`).\n\n"
        )
    tokenizer = f"Its tokenizer is that of `{card.base}`{revision}, without changes.\n"
    if card.has_tokenizer:
        changes = "chat template and the new tokens" if card.has_new_tokens else "chat template"
        tokenizer = (
            f"Its tokenizer is in this folder: that of the base, with the {changes}\n"
            "of the training.\n"
        )
    if card.has_new_tokens:
        tokenizer += (
            "The adapter has embeddings of new tokens. A model that lacks them needs\n"
            "`model.resize_token_embeddings(len(tokenizer))` first.\n"
        )
    table = ""
    if card.metrics:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in card.metrics.items())
        table = f"| figure | value |\n| --- | --- |\n{rows}\n\n"
        if card.measured_by:
            table += f"Measured on {card.measured_by}.\n\n"
    hqq_tag = "" if card.nbits is None else "- hqq\n"
    text = f"""---
library_name: peft
{base_line}tags:
- lora
{hqq_tag}- hqqtrain
---

{_describe_base(card, revision)}
    {card.fingerprint}

{step}{table}## How to load it

{_how_to_load(card)}
{tokenizer}"""
    return signed_card(text)


def _describe_base(card: AdapterCard, revision: str) -> str:
    """Return the heading, and the paragraph that ends with the fingerprint of the base."""
    if card.nbits is None:
        return f"""# LoRA adapter for a base in full precision

Trained by hqqtrain on `{card.base}`{revision}, which was not quantized (`quant.nbits=null`;
{card.bits_per_weight:.2f} bits per weight). The fingerprint of the adapted layers of the base is
"""
    group = "a whole row or column" if card.group_size is None else f"groups of {card.group_size}"
    text = ""
    if card.calibration is not None:
        text = f",\ncalibrated on {card.calibration_tokens:,} tokens of `{card.calibration}`"
    weight = f"{card.bits_per_weight:.2f} bits per weight"
    return f"""# LoRA adapter for a {card.nbits}-bit HQQ base

Trained by hqqtrain on `{card.base}`{revision}, quantized to {card.nbits} bits
({group}, axis {card.axis}, solver `{card.solver}`{text}; {weight},
scales and zeros counted). It repairs the error of exactly that base, whose fingerprint is
"""


def _how_to_load(card: AdapterCard) -> str:
    """Return the ways to load the adapter on its base."""
    if card.nbits is not None and not card.has_saved_base:
        return f"""The run did not save its quantized base (`quant.save=false`), so
`adapter_config.json` names `{card.base}`. Its dense weights are another base: the adapter adds
noise to them. Quantize it again with `task=quantize` and the settings of the run, which gives the
same fingerprint, and load the result:

{_QUANTIZED}"""
    commands = """On its base, in the run's directory: `python -m hqqtrain task=eval
model.name_or_path=<run directory>`.

As dense weights in one checkpoint, for any tool: `python -m hqqtrain task=export
model.name_or_path=<run directory>`.
"""
    if card.nbits is None:
        return f"""{commands}
With PEFT, on `{card.base}` itself:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "<this folder>")
```
"""
    return f"""{commands}
With PEFT, on `quantized/` of the run, which `adapter_config.json` names as the base:

```python
import hqqtrain  # lets PEFT load quantized layers; without it the base is refused
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("<this folder>")
```

If this folder was copied without the run, load the base by its new path:

{_QUANTIZED}
PEFT without hqqtrain needs a dense model that holds the *dequantized* weights of this base:
`python -m hqqtrain task=export model.name_or_path=<run directory>/quantized`.
"""


_QUANTIZED = """```python
import hqqtrain
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("<quantized folder>")
model = PeftModel.from_pretrained(model, "<this folder>")  # refused on any other base
```
"""
