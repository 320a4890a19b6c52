"""Backbones by name: names.py knows which, build.py makes one, base.py says what each must do."""
