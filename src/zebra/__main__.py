"""`python -m zebra` is the command `zebra`."""

from zebra.cli import main

if __name__ == "__main__":
    main()
