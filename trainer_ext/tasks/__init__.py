"""The tasks that this project trains on, each with the stock Trainer: one main program a file.

``scripts/train_*.py`` and ``hf-precond train CONFIG.yaml`` run them. They need what the extra
``scripts`` of the package brings.
"""
