"""Run `python -m hqqtrain`, which is the same as the console script `hqqtrain`."""

import sys

from hqqtrain.cli import main

sys.exit(main())
