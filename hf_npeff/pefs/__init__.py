"""Stores of PEFs, in memory and on disk."""
