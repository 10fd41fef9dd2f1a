"""`python -m zerotune benchmark`: cells of a matrix are real runs of train.py (or of the Trainer); their numbers become a table."""
