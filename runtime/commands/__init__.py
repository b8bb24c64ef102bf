"""One file per command of gtr-run, and what the commands share."""
