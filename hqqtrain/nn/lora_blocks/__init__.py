"""LoRA blocks: linears with LoRA that are computed together, as one autograd function.

`adapted_linear.py` reads the parameters of PEFT's modules, `products.py` has the products and their
gradients, `linears.py` and `mlp.py` the autograd functions and the blocks that call them.
"""

from hqqtrain.nn.lora_blocks.linears import SharedInputBlock
from hqqtrain.nn.lora_blocks.mlp import GatedMLPBlock, adds_residual

__all__ = ["GatedMLPBlock", "SharedInputBlock", "adds_residual"]
