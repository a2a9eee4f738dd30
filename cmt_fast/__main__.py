"""``python -m cmt_fast`` is ``cmt-fast``."""

from cmt_fast.cli import main

main()
