"""lm-eval tasks where there are no stock ones, and the code that their YAML files name."""
