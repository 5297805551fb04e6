"""Kernels run for real where there is a GPU, and in Triton's interpreter where there is none."""

import os

import torch

if not torch.cuda.is_available():
    # Before anything imports triton: its own functions are decorated when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
