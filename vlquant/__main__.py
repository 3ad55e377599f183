"""`python -m vlquant` is the `vlquant` command."""

from vlquant.cli import main

if __name__ == "__main__":
    main()
