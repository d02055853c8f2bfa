"""``python -m trainer_ext SCRIPT ...`` runs a script with our optimizers; COMMAND, a command."""

from trainer_ext.cli import run_main

if __name__ == "__main__":
    run_main()
