"""`python -m fedlora`: the command line."""

from fedlora.cli import main

main()
