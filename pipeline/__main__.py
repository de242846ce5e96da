"""`python -m pipeline ...` is `lazypipe ...`."""

from pipeline.cli import main

main()
