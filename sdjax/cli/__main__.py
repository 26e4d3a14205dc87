"""`python -m sdjax.cli`, the same as `sdjax`."""

import sys

from sdjax.cli import script

sys.exit(script())
