"""`python -m twofold.cli`, which is what torchrun starts."""

from twofold.cli import main

main()
