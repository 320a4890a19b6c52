"""Published weights: their layouts, and the files that hold them.

Not hashed into the key of a run: an imported run is known by its weights.
"""
