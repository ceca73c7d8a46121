"""The command line of EvoComp with this example's vision tower known to transformers.

    python -m experiments.real.evocomp_real train --config experiments/real/published.yaml

Everything after the name goes to `evocomp`; nothing else differs.
"""

import sys

import experiments.real.attention  # noqa: F401  registers both towers
from evocomp.cli import main

if __name__ == "__main__":
    sys.exit(main())
