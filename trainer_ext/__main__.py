"""``python -m trainer_ext SCRIPT ...`` runs an unmodified script with our optimizers."""

from trainer_ext.cli import run_main

if __name__ == "__main__":
    run_main()
