"""The command ``skipvit``, as ``python -m skipvit_fx``."""

from skipvit_fx.cli import main

if __name__ == "__main__":
    main()
