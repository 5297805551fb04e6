"""What `task=` names, from the configuration to the last file: a run's plan, model, record."""

import logging
import os

# On import, which peft causes, bitsandbytes warns that it fetched no kernels from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# GNU OpenMP's threads spin for milliseconds while they wait. Where other work shares the cores,
# that made training 20 times slower (220 instead of 4,600 tokens/s, 2 cores); a short spin costs
# 5 % on an idle machine and keeps a third of the speed beside a second run. Read at torch's import.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
