"""`python -m miaformer`, the same as `miaformer`."""

import sys

from miaformer.cli import main

if __name__ == "__main__":  # not in worker processes, which import this file too
    sys.exit(main())
