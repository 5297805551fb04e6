"""Load a folder with mlx_lm and save its logits: FOLDER TOKENS.npy LOGITS.npy DTYPE [ADAPTER].

The model computes in DTYPE.
"""

import sys

import mlx.core as mx
import numpy as np
from mlx_lm import load

folder, tokens, logits, dtype, *adapter = sys.argv[1:]
model, _ = load(folder, adapter_path=adapter[0] if adapter else None)
model.set_dtype(getattr(mx, dtype))
output = model(mx.array(np.load(tokens))).astype(mx.float32)
np.save(logits, np.array(output))
