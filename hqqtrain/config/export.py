"""The config group of task=export, with the help text of every key."""

from dataclasses import dataclass

from hqqtrain.config.field import DTYPES, key

EXPORT_FORMATS = ("dense", "packed", "hqq", "mlx", "humming", "compressed-tensors")
"""The names of the registry of export formats, which imports torch. A test compares them."""

ADAPTER_FORMS = ("auto", "separate", "merge", "none")


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The format that task=export writes."""

    format: str = key(
        "dense",
        "dense: a Hugging Face checkpoint, weights dequantized; packed: like a run's quantized/; "
        "hqq: for the hqq library; mlx: for Apple's machines; humming: for vLLM and SGLang; "
        "compressed-tensors: for vLLM, after quant.zero=integer at 8 or 4 bits",
        choices=EXPORT_FORMATS,
    )
    adapter: str = key(
        "auto",
        "separate: the adapter beside the base, in the form of the other program; merge: in the "
        "weights; none: the base alone; auto: merge for dense, else separate",
        choices=ADAPTER_FORMS,
    )
    dtype: str = key(
        "auto",
        "dtype of the floating-point tensors; auto: what suits the format, and for dense that of "
        "train.precision",
        choices=DTYPES,
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
