"""`python -m cascade_nodes.headless` is `cascade`."""

import sys

from .cli import main

sys.exit(main())
