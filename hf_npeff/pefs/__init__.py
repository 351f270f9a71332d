"""What a PEF store holds and where it is kept."""
