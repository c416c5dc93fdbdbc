"""`python -m fastpeft` is the `fastpeft` command."""

from fastpeft.cli import main

main()
