"""`python -m kivnun`: the command, as torchrun starts it."""

from kivnun.cli.main import main

if __name__ == "__main__":
    main()
