"""What a process of `fpo` imports, for the server that processes.py forks from."""

import contextlib
import sys

# Imported as in engine.py: its logger keeps the stdout that it finds.
with contextlib.redirect_stdout(sys.stderr):
    import deepspeed

    # Only when an engine is made, and it brings torch's compiler: two seconds.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import sae_lens  # noqa: F401
import transformers  # noqa: F401

import fpocli.caching.cache
import fpocli.training.train  # noqa: F401
