"""``python -m actstore``: the command line, for those without the script on their path."""

from actstore.cli import main

if __name__ == "__main__":
    main(prog_name="actstore")
