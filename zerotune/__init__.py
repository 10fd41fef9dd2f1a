"""The rooms of Zerotune: each module does one job for train.py and can be used on its own."""
