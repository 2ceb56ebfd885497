"""`python -m planish.optimizer.cli` is `planish`."""

from planish.optimizer.cli import main

main()
