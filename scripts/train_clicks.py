#!/usr/bin/env python
"""Trains a small click-through model on a file of Criteo's with the stock Trainer.

    scripts/train_clicks.py --help

The program is trainer_ext/tasks/clicks.py.
"""

from trainer_ext.tasks.clicks import main

if __name__ == "__main__":
    main()
