"""`python -m prolora_tools`."""

from prolora_tools.cli import main

if __name__ == "__main__":
    main()
