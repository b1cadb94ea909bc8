"""`python -m gptjax`."""

from gptjax.cli import main

if __name__ == "__main__":
    main()
