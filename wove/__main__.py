"""``python -m wove`` is the command ``wove``."""

import sys

from wove.cli import main

sys.exit(main())
