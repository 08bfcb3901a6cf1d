"""Checkpoints as their authors publish them, into the folders that load here: what `tiltscope convert` does."""
