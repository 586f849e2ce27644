"""``python -m hbcore`` is the ``hbcore`` command."""

import sys

from hbcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
