"""Entry point of `python -m hqqtrain`, which does the same as the console script `hqqtrain`."""

import sys

from hqqtrain.cli import main

sys.exit(main())
