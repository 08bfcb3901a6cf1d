"""What every vision trunk is to the rest: pictures in, tokens of one hooked layer out.

Knows tensors; must not know architectures, files, features or sampling.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiltscope.engine.errors import ConfigError
from tiltscope.kernels.dispatch_preprocess import preprocess
from tiltscope.kernels.implementation import Implementation

CPU = torch.device("cpu")
LEAST_MEAN_SQUARE = 1e-12


class Trunk(nn.Module):
    """x0 -> tokens [batch, prefix + gh gw, width] at one hook; later layers are never built.

        pixels = ((x0 + 1)/2 - mean)/std        x0 in [-1, 1]; no clamp: an estimate outside the range keeps its gradient

    Patch tokens stand in C order of the grid, after the prefix tokens (class token, registers). An architecture defines
    `tokens(pixels)`; tables that are values rather than weights are made in `_set_tables`, anew for each dtype.

    hook, width; grid = (gh, gw); num_prefix_tokens; image_size = (h, w) pixels; input_shape of one sample.
    rescales: whether tokens are brought to one length (`rescaled`).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        hook: str,
        *,
        width: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.hook, self.width = hook, width
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.image_size = image_size
        self.rescales = False
        self._mean, self._std = tuple(mean), tuple(std)
        # One sibling a dtype and device, shared by all of them, so that every feature of a hook runs the same module.
        self._siblings: dict[tuple[torch.dtype, torch.device], Trunk] = {}

    def _set_tables(self, dtype: torch.dtype) -> None:
        # On the CPU even when the parameters are being built on the meta device: these are values, not weights to be loaded.
        with torch.device("cpu"):
            mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (self._mean, self._std))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (3, *self.image_size)

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channel"]:
        """The hooked layer of normalised pixels."""
        raise NotImplementedError

    def forward(
        self, x0: Float[Tensor, "batch 3 height width"], *, kernels: Implementation = "reference"
    ) -> Float[Tensor, "batch tokens channel"]:
        """kernels: which implementation of the op preprocess runs. Raises ConfigError for pictures of another size."""
        if x0.ndim != 4 or x0.shape[1:] != self.input_shape:
            raise ConfigError(
                f"the trunk reads pictures [batch, 3, {self.image_size[0]}, {self.image_size[1]}]; got {list(x0.shape)}"
            )
        return self.hooked(preprocess(x0, self.mean, self.std, dtype=self.dtype, implementation=kernels))

    def hooked(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channel"]:
        """The hooked layer of normalised pixels, its tokens brought to one length where this trunk is `rescaled`."""
        tokens = self.tokens(pixels)
        if not self.rescales:
            return tokens
        # The least mean square keeps the derivative of a token of zeros finite.
        return tokens * torch.rsqrt((tokens * tokens).mean(dim=-1, keepdim=True) + LEAST_MEAN_SQUARE)

    def rescaled(self) -> "Trunk":
        """This trunk with tokens of length sqrt(width), token sqrt(width)/|token|: how some autoencoders read a hook.

        It shares the weights, and is another trunk: its features do not add to those of this one.
        """
        other = copy.copy(self)
        other.hook, other.rescales, other._siblings = f"{self.hook} (tokens of one length)", True, {}
        return other

    def on_pictures(self) -> "Trunk":
        """This trunk for pictures, where samples are something else; itself where they are pictures. Shares the weights."""
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def in_dtype(self, dtype: torch.dtype, device: torch.device = CPU) -> "Trunk":
        """This trunk with its weights in dtype on device; self is not changed, and asking twice gives the same module.

        Weights are cast from the float32 ones that were loaded; tables are computed anew (float64 gets float64 tables).
        """
        loaded, wanted = (torch.float32, CPU), (dtype, device)
        self._siblings.setdefault(loaded, self)
        if wanted not in self._siblings:
            source = self._siblings[loaded]
            siblings, source._siblings = source._siblings, {}
            sibling = copy.deepcopy(source).to(dtype)
            sibling._set_tables(dtype)
            sibling.to(device)
            source._siblings = sibling._siblings = siblings
            siblings[wanted] = sibling
        return self._siblings[wanted]
