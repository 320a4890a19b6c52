"""Tables 1 to 5 of arXiv 1709.02929: `python -m kdtrain reproduce`.

paper.py, the tables as printed and their claims, names kinds of runs (parts.py). stages.py makes
pipeline stages of them for widths, seeds and data, reproduce.py plans and runs, collect.py reads
the run folders into the tables of data.py, and text.py, plot.py, page.py and files.py write them.
"""
