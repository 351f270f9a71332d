"""`python -m hf_npeff` is the command line `hf-npeff`."""

from hf_npeff.cli import main

if __name__ == "__main__":
    main()
