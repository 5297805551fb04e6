"""The settings of a run that decide how much memory and disk it needs."""

from dataclasses import dataclass

from hqqtrain.config.activation_checkpointing import count_recomputed


@dataclass(frozen=True)
class Workload:
    """The settings of a run that decide how much memory and disk it needs.

    Attributes:
        task: The value of `task`.
        model_name: The value of `model.name_or_path`.
        is_synthetic: Whether the weights are generated instead of read.
        nbits: The value of `quant.nbits`; None: nothing is quantized.
        saves_quantized: Whether quantized/ is to be saved and does not exist yet.
        adapter_rank: The value of `adapter.r`.
        adapter_itemsize: Bytes of an element of the adapters.
        optimizer: The value of `optim.name`.
        micro_batch_size: The value of `train.micro_batch_size`.
        max_seq_len: The value of `train.max_seq_len`.
        activation_checkpointing: The value of `train.activation_checkpointing`.
        offload: The value of `parallel.offload`.
        offloads_meta: Whether scale and zero are offloaded from a GPU to the host.
        offloads_activations: Whether activations are offloaded from a GPU to the host.
        evaluates: Whether a held-out text is evaluated.
        reference: The value of `eval.reference`; `off` if no other model is in memory.
        eval_tokens: The value of `eval.tokens`.
        eval_context: Tokens in a window of the evaluation.
        export_format: The value of `export.format`.
        new_checkpoints: Largest number of checkpoints by which the run's directory will grow.
        run_root: The value of `run.root`.
        calibration_tokens: Tokens of calibration text; 0: none.
        global_batch_size: The value of `train.global_batch_size`.
        is_fused: Whether LoRA blocks compute the linears, where the model allows it.
    """

    task: str
    model_name: str
    is_synthetic: bool
    nbits: int | None
    saves_quantized: bool
    adapter_rank: int
    adapter_itemsize: int
    optimizer: str
    micro_batch_size: int
    max_seq_len: int
    activation_checkpointing: str | int
    offload: str
    offloads_activations: bool
    evaluates: bool
    reference: str
    eval_tokens: int
    export_format: str
    new_checkpoints: int
    run_root: str
    calibration_tokens: int = 0
    eval_context: int = 0
    offloads_meta: bool = False
    global_batch_size: int = 1
    is_fused: bool = False

    @property
    def trains(self) -> bool:
        return self.task == "finetune"

    @property
    def smaller_reference(self) -> str:
        """The values of `eval.reference` that need less memory."""
        return "streamed or off" if self.reference == "resident" else "off"

    @property
    def tokens(self) -> int:
        """Largest number of tokens of a micro-batch."""
        return self.micro_batch_size * self.max_seq_len

    def recomputed_layers(self, num_layers: int) -> int:
        """Return how many of `num_layers` decoder layers recompute their activations."""
        return count_recomputed(self.activation_checkpointing, num_layers)
