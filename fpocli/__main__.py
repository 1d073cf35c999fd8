"""python -m fpocli, which torchrun can launch."""

from fpocli.cli import main

main()
