"""Tests of processes talk to real workers with the helpers of the tests of attention workers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
