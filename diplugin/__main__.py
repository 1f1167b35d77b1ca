"""`python -m diplugin` is the `diplugin` command."""

import sys

from .cli import main

sys.exit(main())
