"""`python -m megalith` is the `megalith` command."""

from .cli import main

main()
