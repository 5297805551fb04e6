"""LoRA blocks: linears with LoRA that are computed together, as one autograd function.

`adapted_linear.py` reads the parameters of PEFT's modules, and `adapter_casts.py` casts them.
`products.py` has the products and their gradients, `linears.py` and `mlp.py` the autograd functions
and the blocks that call them.
"""

from hqqtrain.nn.lora_blocks.adapter_casts import AdapterCasts
from hqqtrain.nn.lora_blocks.linears import SharedInputBlock
from hqqtrain.nn.lora_blocks.mlp import GatedMLPBlock, adds_residual

__all__ = ["AdapterCasts", "GatedMLPBlock", "SharedInputBlock", "adds_residual"]
