"""`python -m speechgpt.runtime.stack`."""

from speechgpt.runtime.stack.command import main

if __name__ == "__main__":
    main()
