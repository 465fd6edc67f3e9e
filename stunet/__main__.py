"""``python -m stunet``."""

from stunet.cli.main import main

if __name__ == "__main__":
    main()
