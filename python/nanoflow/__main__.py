"""`python -m nanoflow`: the command nanoflow."""

import sys

from nanoflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
