"""`python -m hesscope` is the command line."""

from hesscope.cli import main

main()
