"""Image downsampling: the image size that gives at most R tokens. The caller resizes and encodes the image."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Downsampling:
    """Size of a downsampled image."""

    grid: tuple[int, int]
    """(rows, columns) of its tokens."""
    size: tuple[int, int]
    """(height, width) in pixels."""

    @property
    def count(self) -> int:
        """Number of its tokens, at most the requested number."""
        return self.grid[0] * self.grid[1]


def distortion(grid: tuple[int, int], smaller: tuple[int, int]) -> float:
    """Factor, at least 1, by which the aspect ratio of `smaller` differs from that of `grid`."""
    stretch = smaller[0] * grid[1] / (smaller[1] * grid[0])
    return max(stretch, 1 / stretch)


def downsampled_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """The largest grid of at most `keep` tokens that keeps the aspect ratio of `grid`, up to rounding to tokens.

    24 x 24 gives 13 x 13, 12 x 12, 11 x 11 and 8 x 8 for 192, 144, 128 and 64.
    """
    rows, columns = grid
    by_row = ((a, max(1, round(a * columns / rows))) for a in range(1, rows + 1))
    by_column = ((max(1, round(b * rows / columns)), b) for b in range(1, columns + 1))
    fits = {(1, 1)} | {pair for pair in (*by_row, *by_column) if pair[0] * pair[1] <= keep}
    return max(fits, key=lambda pair: (pair[0] * pair[1], -distortion(grid, pair), -pair[0]))


def downsample(grid: tuple[int, int], keep: int, patch: int = 14) -> Downsampling:
    """Size of the downsampled image for an encoder that makes one token of `patch` x `patch` pixels.

    `patch` includes merging: 14 for CLIP ViT-L/14, 28 for Qwen2-VL (patch size 14, 2 x 2 patches merged). An encoder
    with learned position embeddings, such as CLIP, must interpolate them. An encoder that resizes every image to a
    fixed size saves no tokens.
    """
    rows, columns = downsampled_grid(grid, keep)
    return Downsampling((rows, columns), (rows * patch, columns * patch))
