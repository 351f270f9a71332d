"""Components as weight changes: directions, adapters, and what they do to predictions."""
