"""The config group of task=generate, with the help text of every key."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqtrain.config.field import is_names, key

AUTO_OR_BOOL = ("auto", True, False)

TRAINED, QUANTIZED, FULL_PRECISION = "trained", "quantized", "full_precision"
"""Values of generate.use."""


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """The texts that task=generate generates; sampling keys that are null are the model's own."""

    prompt: Any = key(  # str | list[str] | None, a union that OmegaConf does not have
        None,
        "a prompt, or a list of prompts; without any prompts, each line of standard input is one, "
        "and on a terminal there is a chat",
    )
    prompts_file: str | None = key(
        None,
        "file with a prompt in every line; or JSON Lines (.jsonl), whose rows have prompt, or "
        "messages",
    )
    output: str | None = key(
        None,
        "new JSON Lines file that gets the prompts with their replies, in a form that can be "
        "trained on",
    )
    use: str = key(
        "auto",
        "which model of a run to use; auto: trained if there is an adapter; full_precision: the "
        "model that it was made from",
        choices=("auto", TRAINED, QUANTIZED, FULL_PRECISION),
    )
    chat: Any = key(
        "auto",
        "whether a prompt is the message of a user, and not a beginning that is continued; auto: "
        "whether the tokenizer has a chat template",
        choices=AUTO_OR_BOOL,
    )
    system: str | None = key(None, "system message of chats that have none")
    max_new_tokens: int | None = key(
        512,
        "most tokens of a reply; null: until the model ends it, or until its context is full",
        low=1,
    )
    temperature: float | None = key(
        None, "divides the logits; 0: always the most likely token", low=0
    )
    top_k: int | None = key(None, "number of most likely tokens to choose from; 0: all", low=0)
    top_p: float | None = key(
        None,
        "choose from the most likely tokens that together have this probability",
        low=0,
        high=1,
    )
    min_p: float | None = key(
        None,
        "choose from the tokens with at least this share of the highest probability",
        low=0,
        high=1,
    )
    repetition_penalty: float | None = key(
        None, "above 1, tokens that occur in the text already become less likely", low=0
    )
    seed: int | None = key(
        None,
        "seed of the random numbers; null: other texts every time",
        low=0,
        high=2**64 - 1,
    )
    compile: Any = key(
        "auto",
        "compile the model for decoding, with a static cache; auto: on a GPU, if the code of the "
        "model allows it",
        choices=AUTO_OR_BOOL,
    )

    def errors(self) -> Iterator[str]:
        """Yield one message for every value that is not allowed, and every combination."""
        listed = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if self.prompt is not None and (not listed or not is_names(listed)):
            yield (
                f"generate.prompt={self.prompt}: must be text, or a list of texts, none of which "
                "is empty."
            )
        if self.repetition_penalty == 0:
            yield "generate.repetition_penalty=0: must be above 0; 1 changes nothing."
        if self.top_p == 0:
            yield "generate.top_p=0: must be above 0; for the most likely token, use temperature=0."
        if self.system is not None and self.chat is False:
            yield (
                "generate.system: with generate.chat=false a prompt is continued as it is; leave "
                "one of the two out."
            )
