#!/usr/bin/env python
"""Trains an image classifier with the stock Trainer.

    scripts/train_classifier.py --help

The program is trainer_ext/tasks/image_classifier.py.
"""

from trainer_ext.tasks.image_classifier import main

if __name__ == "__main__":
    main()
