"""Output of a run while it trains.

Not hashed into the key of a run: no number of the network depends on it.
"""
