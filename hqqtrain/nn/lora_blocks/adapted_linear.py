"""A linear with LoRA, as PEFT's module has it: its parameters, and whether a block may use them."""

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from hqqtrain.compat import has_hooks
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora_blocks.products import Weight


@dataclass(frozen=True, eq=False)
class AdaptedLinear:
    """PEFT's module around a linear of the base, with one active adapter.

    PEFT may change its module at any time. So the parameters are read at each call, and `is_ready`
    says whether the module still computes W x + b + s B A x.

    Attributes:
        module: PEFT's module.
        base: The linear with the frozen weight.
        name: The adapter's name in PEFT.
    """

    module: LoraLinear
    base: HQQLinear | nn.Linear
    name: str

    @property
    def A(self) -> Tensor:
        """The matrix A [r, in_features]."""
        linear: Any = self.module.lora_A[self.name]
        return linear.weight

    @property
    def B(self) -> Tensor:
        """The matrix B [out_features, r]."""
        linear: Any = self.module.lora_B[self.name]
        return linear.weight

    @property
    def scaling(self) -> float:
        """The factor of B A x."""
        return self.module.scaling[self.name]

    @property
    def weight(self) -> Weight:
        """The frozen weight [out_features, in_features]."""
        return self.base.packed_weight() if isinstance(self.base, HQQLinear) else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias [out_features], if any."""
        return self.base.bias

    def is_ready(self) -> bool:
        """Whether the module computes now what a block computes."""
        module, name = self.module, self.name
        dropout = module.lora_dropout[name]
        return (
            not module.disable_adapters
            and not module.merged
            and module.active_adapters == [name]
            and module.base_layer is self.base
            and not (module.training and _drops(dropout))
            and not any(map(has_hooks, self._inner_modules()))
        )

    def _inner_modules(self) -> tuple[nn.Module, ...]:
        module, name = self.module, self.name
        return self.base, module.lora_A[name], module.lora_B[name], module.lora_dropout[name]


def adapted_linear(module: LoraLinear) -> AdaptedLinear | str:
    """Return the adapted linear in PEFT's `module`, or the reason why a block cannot compute it."""
    base: Any = module.base_layer
    if len(module.active_adapters) != 1:
        return f"{len(module.active_adapters)} active adapters"
    name = module.active_adapters[0]
    if name not in module.lora_A or type(module).forward is not LoraLinear.forward:
        return f"an adapter of {type(module).__name__}"
    linear = AdaptedLinear(module, base, name)
    A, B = module.lora_A[name], module.lora_B[name]
    obstacles = {
        f"a base of {type(base).__name__}": not isinstance(base, HQQLinear)
        and type(base) is not nn.Linear,
        "a variant of LoRA, such as DoRA": name in module.lora_variant,
        "a bias of LoRA": A.bias is not None or B.bias is not None,
        "a trained bias": base.bias is not None and base.bias.requires_grad,
        "a trained weight": any(p.requires_grad for p in base.parameters()),
        "scale and zero in host memory": getattr(base, "fetch_meta", None) is not None,
        "adapter.dropout": _drops(module.lora_dropout[name]),
        "a hook on an inner module": any(map(has_hooks, linear._inner_modules())),
        "merged weights": module.merged,
    }
    return next((reason for reason, applies in obstacles.items() if applies), linear)


def _drops(dropout: nn.Module) -> bool:
    return not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0
