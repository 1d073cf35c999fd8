"""The processes of one run: which of them speaks for all."""

import os

from fpocli.system.errors import UserError


def is_first_rank() -> bool:
    """Whether this process has rank 0 of those a launcher started, or is the only one."""
    return os.environ.get("RANK", "0") == "0"


def same_on_all_ranks(error: UserError) -> BaseException:
    """What to raise where every rank meets the same error: rank 0 reports it, the others exit."""
    return error if is_first_rank() else SystemExit(2)
