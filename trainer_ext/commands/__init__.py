"""The commands of ``hf-precond``, one file each; ``trainer_ext.cli`` puts them together.

A command raises ValueError or OSError for what the user got wrong: the command line shows it as one
line. One that runs the user's own code returns a function that does: its errors are the user's.
"""
