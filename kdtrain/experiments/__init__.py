"""Many runs: stages and their order, processes, cost and budget, studies."""
