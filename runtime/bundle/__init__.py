"""The folder that passes from the machine with the checkpoint to the machine that serves."""
