"""``python -m reparam``."""

from reparam.cli import main

main()
