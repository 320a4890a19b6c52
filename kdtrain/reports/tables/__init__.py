"""A result table and its files: text, Markdown, CSV, HTML, PNG."""
