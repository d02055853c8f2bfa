#!/usr/bin/env python
"""Trains the deep autoencoder of optimizer papers with the stock Trainer.

    scripts/train_autoencoder.py --help

The program is trainer_ext/tasks/autoencoder.py.
"""

from trainer_ext.tasks.autoencoder import main

if __name__ == "__main__":
    main()
