"""Published weights written as run directories.

Not hashed into the key of a run: an imported run is known by its weights.
"""
