"""`python -m niwaki` is `niwaki`."""

import sys

from niwaki.cli import main

sys.exit(main())
