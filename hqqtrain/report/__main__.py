"""Write the report of a run that is not over: the process that `LiveReport` starts.

The argument is the run directory, and standard input has the summary so far as JSON.
"""

import json
import os
import sys
from pathlib import Path

from hqqtrain.report.run_report import write_report

if __name__ == "__main__":
    os.nice(19)
    write_report(Path(sys.argv[1]), json.load(sys.stdin))
