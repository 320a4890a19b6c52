"""Backbones by name, with the stages and features that targets compare."""
