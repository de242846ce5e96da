"""`python -m lazypipe ...` is `lazypipe ...`."""

from lazypipe.pipeline.cli import main

if __name__ == "__main__":
    main()
