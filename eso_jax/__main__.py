"""`python -m eso_jax` is `eso-jax`."""

import sys

from eso_jax.cli import main

sys.exit(main())
