"""What a run writes and shows while it trains.

Not hashed into the key of a run: no number of the network depends on it.
"""
