"""Several methods under one budget: the request, its runs, costs, claims, table and figure."""
