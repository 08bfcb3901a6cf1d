"""The picture that samples set out from instead of noise (`start`)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.prior import Prior


def starting_picture(prior: Prior, path: str) -> Float[Tensor, "channel height width"]:
    """The picture in `path` as x0, cut to the prior's shape around its middle and resized. Raises ConfigError."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not prior.pictures or prior.decoder is not None:
        raise ConfigError(f"start: this prior's samples are {list(prior.shape)}, no pictures; leave start out")
    try:
        with Image.open(path) as opened:
            fitted = ImageOps.fit(opened.convert("RGB"), (prior.shape[2], prior.shape[1]), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"start: {path} cannot be read as a picture ({error})") from error
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).to(torch.float32) / 127.5 - 1
