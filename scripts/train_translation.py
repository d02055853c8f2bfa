#!/usr/bin/env python
"""Trains a small translation model with the stock Seq2SeqTrainer.

    scripts/train_translation.py --help

The program is trainer_ext/tasks/translation.py.
"""

from trainer_ext.tasks.translation import main

if __name__ == "__main__":
    main()
