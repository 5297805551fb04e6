"""The work itself: prepare a model, train it, measure it, save it."""

import logging

# On import, which peft causes, bitsandbytes warns that it fetched no kernels from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
