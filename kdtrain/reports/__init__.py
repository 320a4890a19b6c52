"""Run directories read and shown: text, HTML, figures, tables."""
