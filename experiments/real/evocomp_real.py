"""The command `evocomp` with the vision towers of this example registered in transformers.

    python -m experiments.real.evocomp_real train --config experiments/real/published.yaml

All arguments are passed to `evocomp`.
"""

import sys

import experiments.real.attention  # noqa: F401  registers both towers
from evocomp.cli import main

if __name__ == "__main__":
    sys.exit(main())
