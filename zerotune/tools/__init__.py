"""In: a command, `python -m zerotune NAME ...`. Out: a table, a file, an answer.

Tools drive train.py from outside and share its rooms; nothing in those rooms, nor train.py, imports a tool.
"""
