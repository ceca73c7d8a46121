"""Image downsampling: which smaller image gives at most R tokens. The caller resizes and encodes again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Downsampling:
    """A smaller image."""

    grid: tuple[int, int]
    """(rows, columns) of the tokens it gives."""
    size: tuple[int, int]
    """(height, width) in pixels."""

    @property
    def count(self) -> int:
        """Tokens that it gives: at most what was asked for."""
        return self.grid[0] * self.grid[1]


def distortion(grid: tuple[int, int], smaller: tuple[int, int]) -> float:
    """How much longer one side is than the other keeping `grid`'s aspect would make it; 1 is none."""
    stretch = smaller[0] * grid[1] / (smaller[1] * grid[0])
    return max(stretch, 1 / stretch)


def downsampled_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """The largest grid of at most `keep` tokens that keeps the aspect of `grid` as far as whole tokens allow.

    24 x 24 at 192, 144, 128, 64: 13 x 13, 12 x 12, 11 x 11, 8 x 8.
    """
    rows, columns = grid
    by_row = ((a, max(1, round(a * columns / rows))) for a in range(1, rows + 1))
    by_column = ((max(1, round(b * rows / columns)), b) for b in range(1, columns + 1))
    fits = {(1, 1)} | {pair for pair in (*by_row, *by_column) if pair[0] * pair[1] <= keep}
    return max(fits, key=lambda pair: (pair[0] * pair[1], -distortion(grid, pair), -pair[0]))


def downsample(grid: tuple[int, int], keep: int, patch: int = 14) -> Downsampling:
    """The smaller image for an encoder that makes one token of `patch` x `patch` pixels.

    `patch` counts merging: 14 for CLIP ViT-L/14, 28 for Qwen2-VL (patch 14, 2 x 2 merged). An encoder with
    learned positions, such as CLIP, must interpolate them; one that resizes every image to a fixed side
    undoes the saving.
    """
    rows, columns = downsampled_grid(grid, keep)
    return Downsampling((rows, columns), (rows * patch, columns * patch))
