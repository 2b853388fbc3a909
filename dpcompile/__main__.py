"""`python -m dpcompile`: the same as the command `dpcompile`."""

from dpcompile.cli import main

if __name__ == "__main__":
    main()
