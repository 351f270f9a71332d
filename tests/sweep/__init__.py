"""Every model type of transformers, tiny and random, through the front door and by brute force: `make sweep`."""
