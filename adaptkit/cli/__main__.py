"""``python -m adaptkit.cli`` is the command line, too."""

import sys

from adaptkit.cli import main

sys.exit(main())
