"""Load a folder with transformers 4 and hqq, and save its logits: FOLDER TOKENS.npy LOGITS.npy."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, tokens, logits = sys.argv[1:]
AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", torch_dtype=torch.float32)
layer = model.model.layers[0].mlp.down_proj
assert type(layer).__module__ == "hqq.core.quantize", type(layer)
with torch.no_grad():
    output = model(torch.from_numpy(np.load(tokens))).logits
np.save(logits, output.float().numpy())
