"""The reproduction of the tables of arXiv 1709.02929: what is in them, their runs, the command."""
