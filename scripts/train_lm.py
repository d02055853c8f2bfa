#!/usr/bin/env python
"""Trains a causal language model with the stock Trainer.

    scripts/train_lm.py --help

The program is trainer_ext/tasks/language_model.py.
"""

from trainer_ext.tasks.language_model import main

if __name__ == "__main__":
    main()
