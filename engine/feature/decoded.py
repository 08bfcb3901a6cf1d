"""A trunk behind what makes pictures of samples: a decoder of latents, a change of size, or both. To the rest it is a trunk.

    tokens = trunk(resize(decode(x0)))

So one graph holds denoiser, decoder and trunk, and the gradient goes through all three. Knows tensors; must not know files.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.hooked import CPU, Trunk
from tiltscope.engine.prior.decoder import Decoder
from tiltscope.kernels.dispatch_preprocess import preprocess
from tiltscope.kernels.implementation import Implementation
from tiltscope.kernels.reference_preprocess import resize_matrix


class DecodedTrunk(Trunk):
    """`trunk` for samples of `shape`: latents where there is a decoder, else pictures of another size than the trunk's."""

    def __init__(self, trunk: Trunk, *, shape: tuple[int, ...], decoder: Decoder | None = None) -> None:
        super().__init__(
            trunk.hook,
            width=trunk.width,
            grid=trunk.grid,
            num_prefix_tokens=trunk.num_prefix_tokens,
            image_size=trunk.image_size,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        self.trunk, self.decoder = trunk, decoder
        # In a tuple: a module in its own place would be a part of this one.
        self._loaded = (decoder,)
        self._on_pictures: tuple[Trunk, ...] = ()
        self.shape = shape
        self.from_size = (decoder.picture_shape if decoder is not None else shape)[1:]
        self._set_tables(torch.float32)

    def _set_tables(self, dtype: torch.dtype) -> None:
        super()._set_tables(dtype)
        (h, w), (rows, columns) = self.from_size, self.image_size
        with torch.device("cpu"):
            self.rows = nn.Buffer(resize_matrix(h, rows, dtype), persistent=False)
            self.columns = nn.Buffer(resize_matrix(w, columns, dtype), persistent=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.shape

    def forward(
        self, x0: Float[Tensor, "batch channel height width"], *, kernels: Implementation = "reference"
    ) -> Float[Tensor, "batch tokens width"]:
        """Raises ConfigError for samples of another shape."""
        if x0.shape[1:] != self.shape:
            raise ConfigError(
                f"the trunk reads samples [batch, {', '.join(map(str, self.shape))}]; got {list(x0.shape)}"
            )
        picture = x0.to(self.dtype) if self.decoder is None else self.decoder(x0)
        matrices = (self.rows, self.columns) if self.from_size != self.image_size else (None, None)
        mean, std = self.trunk.mean, self.trunk.std
        pixels = preprocess(picture, mean, std, *matrices, dtype=self.dtype, implementation=kernels)
        return self.trunk.hooked(pixels)

    def rescaled(self) -> Trunk:
        return DecodedTrunk(self.trunk.rescaled(), shape=self.shape, decoder=self.decoder)

    def on_pictures(self) -> Trunk:
        """What comes after the decoder: the trunk behind a change of size, or the trunk alone; the same object each time."""
        if self.decoder is None:
            return self
        if not self._on_pictures:
            shape = self.decoder.picture_shape
            same = self.trunk.image_size == shape[1:]
            self._on_pictures = (self.trunk if same else DecodedTrunk(self.trunk, shape=shape),)
        return self._on_pictures[0]

    def in_dtype(self, dtype: torch.dtype, device: torch.device = CPU) -> Trunk:
        """As every trunk's; the decoder too is cast from the float32 weights that were loaded."""
        self._siblings.setdefault((self.dtype, self.device), self)
        wanted = (dtype, device)
        if wanted not in self._siblings:
            (loaded,) = self._loaded
            decoder = None if loaded is None else loaded.in_dtype(dtype, device)
            sibling = DecodedTrunk(self.trunk.in_dtype(dtype, device), shape=self.shape, decoder=decoder)
            sibling._set_tables(dtype)
            sibling.to(device)
            sibling._loaded, sibling._siblings = self._loaded, self._siblings
            self._siblings[wanted] = sibling
        return self._siblings[wanted]
