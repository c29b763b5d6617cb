"""Published checkpoints and files, in and out."""
