"""`python -m jaxinfer.cli` is `jaxinfer`."""

import sys

from jaxinfer.cli import main

sys.exit(main())
