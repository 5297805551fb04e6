"""Load a GGUF file with llama.cpp and save its log-probabilities: as the others, see mlx_logits.py.

The server returns those after a prompt, so each prefix of the tokens is a prompt.
"""

import sys
from pathlib import Path

import numpy as np
import xllamacpp

folder, tokens_file, logits_file, *adapter = sys.argv[1:]
tokens = np.load(tokens_file)[0].tolist()
params = xllamacpp.CommonParams()
params.model.path = str(next(f for f in Path(folder).glob("*.gguf") if f.name != "adapter.gguf"))
params.n_ctx = params.n_batch = 512
params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup, params.verbosity, params.n_gpu_layers = False, -1, 0
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter[0], 1.0
    params.lora_adapters = [lora]
server = xllamacpp.Server(params)
VOCABULARY = 2**16  # at least

rows = []
for end in range(1, len(tokens) + 1):
    answer = server.handle_completions({
        "prompt": tokens[:end], "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0.0,
        "samplers": [], "cache_prompt": True,
    })  # fmt: skip
    choice = answer["choices"][0]["logprobs"]
    if choice is None or not choice["content"]:  # the text would end here: no probabilities
        rows.append({})
        continue
    rows.append({e["id"]: e["logprob"] for e in choice["content"][0]["top_logprobs"]})
size = max(map(len, rows))
logits = np.full((1, len(rows), size), np.nan, np.float32)
for i, row in enumerate(rows):
    logits[0, i, list(row)] = list(row.values())
np.save(logits_file, logits)
