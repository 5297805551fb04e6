"""The model of a run, as lm-evaluation-harness calls models of transformers.

`HFLM` has the requests, the tokens and the order of batches, so the figures are those of
`lm_eval --model hf`. Only the calls of the model and of the other ranks are ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator


class _Handle:
    """The attributes of a model that `HFLM` reads. It is no module, so it ties no weights."""

    def __init__(self, model: nn.Module, config: PretrainedConfig, device: torch.device) -> None:
        self.config, self.device, self.name_or_path = config, device, ""
        self.generate = getattr(model, "generate", None)


class InMemoryModel(HFLM):
    """A causal language model in memory, whose requests the ranks share.

    Args:
        model: The model, a full copy on every rank.
        config: Its configuration.
        tokenizer: Its tokenizer.
        comm: All ranks of the run.
        batch_size: Requests per batch.
        on_batch: Called before every batch of this rank; it may raise to stop.
        shares: Whether each rank gets a part of the requests. Otherwise each computes all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        comm: Communicator,
        batch_size: int,
        on_batch: Callable[[], object],
        *,
        shares: bool,
    ) -> None:
        super().__init__(
            pretrained=_Handle(model, config, comm.device),
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
        )
        self._network, self._on_batch = model, on_batch
        self._comm = comm if shares else SINGLE_PROCESS
        self._rank, self._world_size = self._comm.rank, self._comm.size

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the logits for `inps`, int64 [requests, tokens], padded on the right."""
        self._on_batch()
        with torch.no_grad():
            return self._network(input_ids=inps, use_cache=False).logits

    def _model_generate(self, *arguments: Any, **options: Any) -> Tensor:
        self._on_batch()
        return super()._model_generate(*arguments, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
        """Return the log-likelihood of each continuation, without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, without a progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[Any]:
        return super()._loglikelihood_tokens(requests, **options | {"disable_tqdm": True})

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each prompt, without a progress bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the number of every rank."""
        return torch.tensor(self._comm.all_gather_object(tensor.item()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the object of every rank on rank `dst`, and None on the others."""
        found = self._comm.all_gather_object(obj)
        return found if self._rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._comm.barrier()
