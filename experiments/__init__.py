"""Scripts that print the tables of the README and of experiments/results, each named beside its
table."""
