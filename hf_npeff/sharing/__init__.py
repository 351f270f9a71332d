"""Files on disk and on the Hub, and the cards that describe them."""
