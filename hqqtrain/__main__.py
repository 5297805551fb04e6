"""`python -m hqqtrain`: the same as the console script."""

import sys

from hqqtrain.cli import main

sys.exit(main())
