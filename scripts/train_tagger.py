#!/usr/bin/env python
"""Trains a part-of-speech tagger on a Universal Dependencies treebank with the stock Trainer.

    scripts/train_tagger.py --help

The program is trainer_ext/tasks/tagger.py.
"""

from trainer_ext.tasks.tagger import main

if __name__ == "__main__":
    main()
