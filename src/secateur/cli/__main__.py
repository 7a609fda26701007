"""`python -m secateur.cli`, and `torchrun -m secateur.cli prune ...`."""

from secateur.cli import main

if __name__ == "__main__":
    main()
