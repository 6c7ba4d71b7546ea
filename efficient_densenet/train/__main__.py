"""``python -m efficient_densenet.train``."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
