"""From a prior, a trunk, an autoencoder and a folder of pictures to a bundle: what `tiltscope bundle` does."""
