"""Factorise per-example Fishers into non-negative combinations of rank-1 components."""
