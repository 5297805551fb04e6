"""Load a folder with compressed-tensors, and save its logits: FOLDER TOKENS.npy LOGITS.npy."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

folder, tokens, logits = sys.argv[1:]
config = CompressedTensorsConfig(run_compressed=False)
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, quantization_config=config
)
with torch.no_grad():
    output = model(torch.from_numpy(np.load(tokens))).logits
np.save(logits, output.float().numpy())
