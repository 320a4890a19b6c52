"""Synthetic faces, rendered from parameters: geometry, parameters, renderer and the source."""
