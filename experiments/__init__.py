"""Scripts that print the tables of the docs and of experiments/results, each named beside its
table."""
