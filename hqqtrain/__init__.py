"""hqqtrain: quantize language models to 8, 4, 3, 2 or 1 bit with HQQ and fine-tune them.

The import lets transformers and PEFT load models that hqqtrain has quantized.
"""

from hqqtrain.integrations import register

__version__ = "0.1.0"

register()
