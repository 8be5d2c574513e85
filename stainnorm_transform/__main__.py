"""``python -m stainnorm_transform`` is the command ``stainnorm``."""

import sys

from stainnorm_transform.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
