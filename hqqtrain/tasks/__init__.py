"""The tasks that `task=` selects: plan a model, load it, do the work and record the results."""

import logging
import os

# peft imports bitsandbytes, which warns on import that it fetched no kernels from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The threads of GNU OpenMP spin for milliseconds while they wait. If other processes use the
# same cores, this made training 20 times slower (220 instead of 4,600 tokens/s, 2 cores). A short
# spin costs 5 % on an idle machine and keeps a third of the speed next to a second run. OpenMP
# reads the variable when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
