"""Write report.html of runs again, from what lies in their directories.

python scripts/report.py logs/train/runs/<stamp>
python scripts/report.py logs/train/multiruns/<stamp>        # of every run below
"""

import argparse
import sys
from pathlib import Path

from siamese import reporting

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="a run, or a directory that holds some")
    failed = 0
    for place in parser.parse_args().places:
        runs = sorted(file.parent for file in place.rglob("results.npz"))
        if not runs:
            sys.exit(f"error: no finished run (a directory with results.npz) in {place}")
        for run in runs:
            try:
                print(reporting.write(run))
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)
                failed = 1
    sys.exit(failed)
