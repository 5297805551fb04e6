"""The config groups that define a result, one dataclass each, with the help text of every key.

`model.py`, `quant.py`, `adapter.py`, `export.py`, `generate.py` and `parallel.py` have the groups
of these names, and `infra.py` those that do not change the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqtrain.config.activation_checkpointing import mode_errors, named_mode
from hqqtrain.config.data_sources import FILE_TYPES, FORMATS, source_errors
from hqqtrain.config.eval_protocols import JOINED_PROTOCOLS, WINDOWS
from hqqtrain.config.field import DTYPES, is_names, key

MAX_EPOCHS = 1_000_000
"""Upper bound of `train.epochs`: beyond any training, and the number of steps stays an integer."""

BUILT_IN_SOURCES = ("python_stdlib", "python_stdlib_chat")
"""Values of data.source and eval.source that every installation has. They have splits and a form
of their own."""

AUTO = "auto"
"""The value of eval.source that holds out a part of data.source."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop; every setting means the same at any number of processes."""

    objective: str = key(
        "next_token",
        "training objective; next_token: cross-entropy of the next token",
        choices=("next_token",),
    )
    max_steps: int | None = key(None, "optimizer steps; takes precedence over train.epochs", low=0)
    epochs: float = key(1.0, "passes over the training data", low=0, high=MAX_EPOCHS)
    global_batch_size: int = key(
        16, "sequences per optimizer step, over all ranks", low=1, high=1 << 20
    )
    micro_batch_size: int = key(1, "most sequences per forward pass of one rank", low=1)
    max_seq_len: int = key(2048, "most tokens per sequence", low=2)
    packing: bool = key(True, "fill each sequence with several texts")
    activation_checkpointing: Any = key(  # str | int, a union that OmegaConf does not have
        "auto",
        "decoder layers that recompute their activations in the backward pass, to save memory; "
        "auto: as few as the memory needs, none, full: all of them, offload: all, with their "
        "inputs in host memory; or a number: the first of them",
    )
    fused: str = key(
        "auto",
        "fused kernels in training steps; auto: where they exist for the model, false: none",
        choices=("auto", "false"),
    )
    precision: str = key(
        "auto", "compute precision; auto: bf16 on a GPU, fp32 on a CPU, but products of training "
        "in bf16 if it has instructions for them", choices=DTYPES,
    )  # fmt: skip
    max_grad_norm: float | None = key(
        1.0, "largest gradient norm, above which gradients are clipped; null: no clipping", low=0
    )
    early_stopping_patience: int | None = key(
        None,
        "evaluations (eval.every) in a row without a lower eval/loss after which training stops; "
        "null: never",
        low=1,
    )
    on_nonfinite: str = key(
        "stop",
        "reaction to a loss or gradient that is NaN or infinite; stop: end the run, skip: leave "
        "the batch out, rollback: leave it out and return to the last checkpoint",
        choices=("stop", "skip", "rollback"),
    )
    seed: int = key(
        0, "random seed of adapter initialization, dropout and the order of samples", low=0
    )
    profile: int | None = key(
        None,
        "optimizer steps to profile after a warm-up; profile/ of the run directory gets a trace "
        "and a table of where their time goes; null: none",
        low=1,
    )

    def __post_init__(self) -> None:
        self.fused = self.fused.lower()  # YAML reads false as False
        self.activation_checkpointing = named_mode(self.activation_checkpointing)

    def errors(self) -> Iterator[str]:
        """Yield a message if `activation_checkpointing` has no value that is allowed."""
        yield from mode_errors(self.activation_checkpointing)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its learning rate schedule."""

    name: str = key(
        "adamw",
        "optimizer; the 8-bit and paged ones need bitsandbytes",
        choices=("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
    )
    lr: float = key(1e-4, "peak learning rate", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    schedule: str = key(
        "cosine",
        "learning rate schedule after the warm-up",
        choices=("cosine", "linear", "constant"),
    )
    warmup_steps: int = key(0, "optimizer steps of linear warm-up", low=0)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The training data."""

    source: Any = key(  # str | list[str | dict], a union that OmegaConf does not have
        "python_stdlib",
        "python_stdlib or python_stdlib_chat, a file, folder or pattern (texts/*.jsonl), the name "
        "of a data set on the hub (name:config), or a list of these: [a.jsonl, {path: b.csv, "
        "repeats: 2}]",
    )
    format: str = key(
        "auto",
        "format of the rows; auto: by their columns; text: data.text_field, chat: messages or "
        "conversations, alpaca: instruction, input and output, completion: prompt and completion, "
        "tokens: input_ids and labels",
        choices=FORMATS,
    )
    file_type: str = key(
        "auto",
        "type of local files; auto: by file extension; text: each file is one text",
        choices=FILE_TYPES,
    )
    text_field: str = key("text", "column or JSON field that contains the text, in format text")
    max_bad_rows: int = key(
        0,
        "most rows that may be left out because they cannot be read, or because the chat template "
        "does not take them; more are an error",
        low=0,
    )
    chat_template: str = key(
        AUTO,
        "how chats are written as text; auto: by the tokenizer's own template; or chatml, gemma, "
        "llama3, mistral, plain, or the path of a .jinja file",
    )
    add_tokens: Any = key(  # list[str] | str | None, a union that OmegaConf does not have
        None,
        "tokens to add to the tokenizer, whose embeddings are trained: a list; or auto: the "
        "markers of the chat template that are no tokens yet",
    )
    loss_on: str = key(
        AUTO,
        "the tokens that are trained; auto: all of plain text, the answers of the assistant in "
        "chats, and completions of prompts; last: only the last answer",
        choices=(AUTO, "assistant", "last", "completion", "all"),
    )
    on_long: str = key(
        AUTO,
        "an example with more than train.max_seq_len tokens; auto: plain text is split if texts "
        "are packed, and other examples are truncated",
        choices=(AUTO, "truncate", "split", "drop", "error"),
    )
    validation: float = key(
        0.02,
        "share of the texts of data.source that eval.source=auto holds out by their hashes, unless "
        "the source has a held-out split",
    )
    streaming: bool = key(
        False,
        "read and tokenize the data while the model is trained, for data that does not fit on the "
        "disk or takes too long to tokenize; needs train.max_steps",
    )
    shuffle_buffer: int = key(
        1000,
        "with data.streaming, number of sequences of train.max_seq_len tokens that are packed and "
        "shuffled together, in memory; 0: sequences are in the order of the data",
        low=0,
        high=1 << 24,
    )
    workers: int | None = key(
        None,
        "processes that encode chats and completions, if there are many; null: one per usable core",
        low=1,
        high=512,
    )
    cache_dir: str | None = key(
        None,
        "folder of tokenized data that runs share; null: ~/.cache/hqqtrain/tokens",
    )
    show: int = key(3, "examples that task=data shows; 0: none", low=0, high=1000)

    def errors(self) -> Iterator[str]:
        """Yield a message for every fault of `source`, `add_tokens` and `validation`."""
        yield from source_errors(self.source)
        tokens = self.add_tokens
        if tokens not in (None, AUTO) and not is_names(tokens):
            yield (
                f"data.add_tokens={tokens}: must be a list of tokens, such as "
                "['<|im_start|>','<|im_end|>'], or auto or null."
            )
        if not 0 < self.validation < 1:
            yield (
                f"data.validation={self.validation}: must be above 0 and below 1; to train on all "
                "texts without an evaluation, set eval.source=null."
            )


STREAMED_REFERENCES = ("streamed", "cached")
"""The values of eval.reference with which decoder layers are in memory one at a time."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The held-out text and the measurements on it."""

    source: str | None = key(
        AUTO,
        "held-out text, in the form of data.source; auto: a part of data.source, by its split or "
        "data.validation; null: no evaluation",
    )
    every: int | None = key(
        None,
        "optimizer steps between evaluations; null: only before and after training",
        low=1,
    )
    tokens: int = key(65536, "most tokens to measure on", low=2)
    protocol: str = key(
        WINDOWS,
        "how perplexity is measured; windows: on a sample of windows of train.max_seq_len tokens, "
        "wikitext2_2048: as in the papers on GPTQ and AWQ, on all texts joined, in windows of 2048 "
        "tokens, hqq: as in hqq's script, with a stride of 512 tokens and 1024 tokens of context",
        choices=(WINDOWS, *JOINED_PROTOCOLS),
    )
    reference: str = key(
        "resident",
        "how the full-precision model is measured for comparison; off: not at all, resident: "
        "loaded as a whole, streamed: one decoder layer at a time, cached: streamed once, and kept "
        "in eval.cache_dir for other runs",
        choices=("off", "resident", *STREAMED_REFERENCES),
    )
    cache_dir: str | None = key(
        None,
        "with eval.reference=cached, folder of the outputs of full-precision models that runs "
        "share; null: ~/.cache/hqqtrain/reference",
    )
    harness: list[str] = key(
        help="tasks of lm-evaluation-harness that the models are measured on, by their names or as "
        "paths of YAML files; needs pip install 'hqqtrain[harness]'",
        factory=list,
    )
    samples: int = key(
        3, "held-out texts whose beginnings each model continues, for the report; 0: none", low=0
    )

    def errors(self) -> Iterator[str]:
        """Yield one message for every combination of these keys that is not allowed."""
        if self.harness and not is_names(self.harness):
            yield f"eval.harness={self.harness}: must be a list of tasks, such as [arc_easy,piqa]."
        elif len({*self.harness}) < len(self.harness):
            yield f"eval.harness={self.harness}: must not have a task twice."
        elif self.harness and self.source is None:
            yield (
                f"eval.harness={self.harness}: eval.source=null turns all evaluations off; set "
                "eval.source."
            )
        protocol = JOINED_PROTOCOLS.get(self.protocol)
        if protocol and self.tokens < protocol.context:
            yield (
                f"eval.tokens={self.tokens}: eval.protocol={self.protocol} measures windows of "
                f"{protocol.context} tokens; use {protocol.context} or more."
            )

    @property
    def streams_reference(self) -> bool:
        """Whether the decoder layers of a full-precision model are in memory one at a time."""
        return self.source is not None and self.reference in STREAMED_REFERENCES

    @property
    def joins_texts(self) -> bool:
        """Whether windows are cut from all held-out texts joined, and not from single texts."""
        return self.protocol != WINDOWS

    def window_shape(self, max_seq_len: int) -> tuple[int, int]:
        """Return context and stride of the windows in tokens; see `JoinedProtocol`.

        Args:
            max_seq_len: `train.max_seq_len`.
        """
        protocol = JOINED_PROTOCOLS.get(self.protocol)
        return (protocol.context, protocol.stride) if protocol else (max_seq_len, max_seq_len)

    def batch_size(self, micro_batch_size: int, max_seq_len: int) -> int:
        """Return the number of windows in a batch, which has the tokens of a micro-batch.

        Args:
            micro_batch_size: `train.micro_batch_size`.
            max_seq_len: `train.max_seq_len`.
        """
        context, _ = self.window_shape(max_seq_len)
        return max(1, micro_batch_size * max_seq_len // context)
