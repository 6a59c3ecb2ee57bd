"""The benchmark of bnext against torch: `python -m bench layers` and `python -m bench train`."""
