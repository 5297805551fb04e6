"""hqqtrain: quantize language models to 8, 4, 3, 2 or 1 bit with HQQ and fine-tune them."""

__version__ = "0.1.0"
