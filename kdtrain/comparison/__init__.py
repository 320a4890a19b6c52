"""Several methods under one budget: `python -m kdtrain compare`.

request.py makes pipeline stages of the methods' recipes, campaign.py (beside this folder) plans and
trains them, cost.py measures what the networks cost, collect.py reads the run folders into a
table of kdtrain/tables, claims.py judges, picture.py draws, compare.py is the command.
"""
