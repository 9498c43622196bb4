"""The test files run two at a time (`addopts` in pyproject.toml), so each process computes with one thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
