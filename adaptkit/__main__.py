"""``python -m adaptkit`` is the command line."""

import sys

from adaptkit.cli import main

sys.exit(main())
