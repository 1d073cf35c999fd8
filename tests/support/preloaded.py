"""What a process of `fpo` imports, for the one that forks.py forks from."""

import contextlib
import sys

# As engine.py imports it: its logger keeps the stdout that it meets.
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed  # noqa: F401
import sae_lens  # noqa: F401
import transformers  # noqa: F401

import fpocli.caching.cache
import fpocli.training.train  # noqa: F401
