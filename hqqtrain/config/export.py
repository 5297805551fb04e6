"""The config group of task=export, with the help text of every key."""

from dataclasses import dataclass

from hqqtrain.config.field import DTYPES, key

EXPORT_FORMATS = ("dense", "packed", "hqq", "mlx", "humming", "compressed-tensors", "gguf")
"""The names of the registry of export formats, which imports torch. A test compares them."""

GGUF_TYPES = ("auto", "Q4_1", "Q4_K", "Q2_K", "Q8_0")
"""`auto` and the block types of `hqqtrain.formats.gguf`, which imports torch."""

ADAPTER_FORMS = ("auto", "separate", "merge", "none")


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The format that task=export writes."""

    format: str = key(
        "dense",
        "dense: a Hugging Face checkpoint, weights dequantized; packed: like a run's quantized/; "
        "hqq: for the hqq library; mlx: for Apple's machines; humming: for vLLM and SGLang; "
        "compressed-tensors: for vLLM, after quant.zero=integer at 8 or 4 bits; gguf: for "
        "llama.cpp, Ollama and LM Studio",
        choices=EXPORT_FORMATS,
    )
    adapter: str = key(
        "auto",
        "separate: the adapter beside the base, in the form of the other program; merge: in the "
        "weights; none: the base alone; auto: merge for dense and for gguf of 8 bits, else "
        "separate",
        choices=ADAPTER_FORMS,
    )
    dtype: str = key(
        "auto",
        "dtype of the floating-point tensors; auto: what suits the format, and for dense that of "
        "train.precision",
        choices=DTYPES,
    )
    gguf_type: str = key(
        "auto",
        "type of the weights in a GGUF file, at 8.5 (Q8_0), 5 (Q4_1), 4.5 (Q4_K) and 2.6 (Q2_K) "
        "bits per weight; auto: for each layer the smallest that keeps its codes",
        choices=GGUF_TYPES,
    )
    llama_cpp: str | None = key(
        None,
        "folder of llama.cpp, whose convert_hf_to_gguf.py writes the metadata and the tokenizer of "
        "a GGUF file; null: hqqtrain does, for the families that it knows",
    )
    max_error: float | None = key(
        None,
        "largest error of a weight in the export, in steps (distances of neighboring codes) of its "
        "group; null: any",
        low=0.0,
    )
    max_kl: float | None = key(
        0.1,
        "largest KL divergence of the export to the quantized model on eval.source, in nats per "
        "token; measured if weights have changed; null: do not measure it",
        low=0.0,
    )
