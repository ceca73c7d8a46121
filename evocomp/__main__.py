import sys

from evocomp.cli import main

sys.exit(main())
