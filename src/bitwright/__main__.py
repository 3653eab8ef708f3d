"""`python -m bitwright` is `bitwright`."""

from __future__ import annotations

from bitwright.cli.main import main

if __name__ == "__main__":
    main()
