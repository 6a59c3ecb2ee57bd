"""The benchmark of batch norms, bnext among them: `python -m bench`."""
