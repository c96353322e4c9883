"""The public PyTorch code's training step, rewritten from its formulas.

A step centres and clamps the inner kernels, saves them, replaces them by `α·sign(w)`,
runs forward and backward, restores the kernels, converts the gradients at `α·sign(w)`
to gradients for `w`, and runs Adam. Kernels are `[C_out, C_in, kh, kw]`, as in PyTorch.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE_MINIMUM = 0.01


class Sign(torch.autograd.Function):
    """`sign(x)`, with the gradient `g · 1[|x| < 1]`."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g.masked_fill(x.abs() >= 1, 0)


class XnorBlock(nn.Module):
    """BatchNorm → sign → dropout → convolution or dense → ReLU."""

    def __init__(
        self,
        norm_features: int,
        product: nn.Conv2d | nn.Linear,
        dropout: float = 0.0,
        relu: bool = True,
    ):
        super().__init__()
        self.norm = nn.BatchNorm2d(norm_features, eps=1e-4, momentum=0.1)
        self.relu = relu
        self.product = product
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(Sign.apply(self.norm(x)))
        if isinstance(self.product, nn.Linear):
            x = x.flatten(1)
        x = self.product(x)
        return F.relu(x, inplace=True) if self.relu else x


class LeNet5(nn.Module):
    """Images `[N, 1, 28, 28]` to logits `[N, 10]`; the middle two layers are binary.

    Args:
      pool: The 2×2 max-pool; None for PyTorch's, which passes the gradient to the first
        of several equal maxima.
    """

    def __init__(self, pool: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.norm1 = nn.BatchNorm2d(20, eps=1e-4, momentum=0.1, affine=False)
        self.block2 = XnorBlock(20, nn.Conv2d(20, 50, 5))
        self.block3 = XnorBlock(50, nn.Linear(4 * 4 * 50, 500))
        self.dense4 = nn.Linear(500, 10)
        self.pool = pool or nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x)), inplace=True))
        x = self.pool(self.block2(x))
        return self.dense4(self.block3(x))

    def inner_kernels(self) -> list[nn.Parameter]:
        """The kernels of every layer but the first and the last."""
        return [self.block2.product.weight, self.block3.product.weight]

    def norm_scales(self) -> list[nn.Parameter]:
        return [self.block2.norm.weight, self.block3.norm.weight]


class NIN(nn.Module):
    """Images `[N, 3, 32, 32]` to logits `[N, 10]`; all but two layers are binary."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 192, 5, padding=2)
        self.norm1 = nn.BatchNorm2d(192, eps=1e-4, momentum=0.1, affine=False)
        self.blocks = nn.Sequential(
            XnorBlock(192, nn.Conv2d(192, 160, 1)),
            XnorBlock(160, nn.Conv2d(160, 96, 1)),
            nn.MaxPool2d(3, 2, 1),
            XnorBlock(96, nn.Conv2d(96, 192, 5, padding=2), dropout=0.5),
            XnorBlock(192, nn.Conv2d(192, 192, 1)),
            XnorBlock(192, nn.Conv2d(192, 192, 1)),
            nn.AvgPool2d(3, 2, 1),
            XnorBlock(192, nn.Conv2d(192, 192, 3, padding=1), dropout=0.5),
            XnorBlock(192, nn.Conv2d(192, 192, 1)),
        )
        self.norm9 = nn.BatchNorm2d(192, eps=1e-4, momentum=0.1, affine=False)
        self.conv9 = nn.Conv2d(192, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.conv9(self.norm9(self.blocks(x))), inplace=True)
        return x.mean((2, 3))

    def inner_kernels(self) -> list[nn.Parameter]:
        """The kernels of every layer but the first and the last."""
        return [block.product.weight for block in self._xnor_blocks()]

    def norm_scales(self) -> list[nn.Parameter]:
        return [block.norm.weight for block in self._xnor_blocks()]

    def _xnor_blocks(self) -> list[XnorBlock]:
        return [block for block in self.blocks if isinstance(block, XnorBlock)]


class Residual(nn.Module):
    """Two binary blocks and a shortcut; the second ReLU follows their sum."""

    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__()
        self.block1 = XnorBlock(
            before, nn.Conv2d(before, after, 3, stride, 1, bias=False)
        )
        self.block2 = XnorBlock(
            after, nn.Conv2d(after, after, 3, padding=1, bias=False), relu=False
        )
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False),
                nn.BatchNorm2d(after, eps=1e-4, momentum=0.1),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block2(self.block1(x)) + self.shortcut(x), inplace=True)


class ResNet18(nn.Module):
    """Images `[N, 3, H, W]` to logits; first, last and shortcut layers are float."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(64, eps=1e-4, momentum=0.1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.residuals = nn.Sequential(
            Residual(64, 64),
            Residual(64, 64),
            Residual(64, 128, 2),
            Residual(128, 128),
            Residual(128, 256, 2),
            Residual(256, 256),
            Residual(256, 512, 2),
            Residual(512, 512),
        )
        self.dense10 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x)), inplace=True))
        return self.dense10(self.residuals(x).mean((2, 3)))

    def inner_kernels(self) -> list[nn.Parameter]:
        """The kernels of the binary blocks."""
        return [m.product.weight for m in self.modules() if isinstance(m, XnorBlock)]

    def norm_scales(self) -> list[nn.Parameter]:
        return [m.weight for m in self.modules() if isinstance(m, nn.BatchNorm2d)]


class LatentKernels:
    """Kernels that are latent between steps and `α·sign(w)` within a step."""

    def __init__(self, kernels: list[nn.Parameter]):
        self.kernels = kernels
        self.saved = [torch.empty_like(kernel) for kernel in kernels]

    @torch.no_grad()
    def project(self) -> None:
        """Centre over the input channels, then clamp."""
        for w in self.kernels:
            w.sub_(w.mean(dim=1, keepdim=True)).clamp_(-1, 1)

    @torch.no_grad()
    def binarize(self) -> None:
        """Save the kernels, then replace them by `α·sign(w)`."""
        for w, saved in zip(self.kernels, self.saved, strict=True):
            saved.copy_(w)
            w.sign_().mul_(_scale(saved))

    @torch.no_grad()
    def restore(self) -> None:
        for w, saved in zip(self.kernels, self.saved, strict=True):
            w.copy_(saved)

    @torch.no_grad()
    def correct_gradients(self) -> None:
        """`(α·1[|w| ≤ 1]·g + s·mean(s·g)) · (1 − 1/C_in) · n`, on latent kernels."""
        for w in self.kernels:
            assert w.grad is not None
            s, g = w.sign(), w.grad
            through_scale = s * (s * g).mean(dim=_taps(w), keepdim=True)
            through_sign = _scale(w) * g.masked_fill(w.abs() > 1, 0)
            centring = (1 - 1 / w.shape[1]) * prod(w.shape[1:])
            w.grad = (through_sign + through_scale).mul_(centring)


class Training:
    """A network, its latent kernels, and Adam with L2 decay added to the gradient."""

    def __init__(
        self,
        net: LeNet5 | NIN | ResNet18,
        learning_rate: float = 0.01,
        weight_decay: float = 1e-5,
    ):
        self.net = net
        self.latent = LatentKernels(net.inner_kernels())
        self.optimizer = torch.optim.Adam(
            net.parameters(), lr=learning_rate, weight_decay=weight_decay
        )

    @torch.no_grad()
    def prepare(self) -> None:
        """Bound the scales, and centre and clamp the kernels, before a forward pass."""
        for scale in self.net.norm_scales():
            scale.clamp_(min=SCALE_MINIMUM)
        self.latent.project()

    def step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step on normalised images; return the loss and the accuracy."""
        self.net.train()
        self.prepare()
        self.latent.binarize()
        self.optimizer.zero_grad()
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.latent.restore()
        self.latent.correct_gradients()
        self.optimizer.step()
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return loss.detach(), accuracy

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Train on every image once, shuffled; return the mean loss and accuracy.

        Args:
          images: uint8 `[N, C, H, W]`.
          labels: int64 `[N]`.
          batch_size: Images per step; an incomplete last batch is dropped.
          mean: The mean of the pixels in [0, 1], `[C, 1, 1]`.
          std: Their standard deviation, `[C, 1, 1]`.
        """
        steps = len(labels) // batch_size
        device = images.device
        order = torch.randperm(len(labels), device=device)[: steps * batch_size]
        losses, accuracies = torch.zeros(2, device=device)
        for index in order.split(batch_size):
            loss, accuracy = self.step(
                normalize(images[index], mean, std), labels[index]
            )
            losses += loss
            accuracies += accuracy
        return losses / steps, accuracies / steps


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise uint8 pixels to float32 by their mean and standard deviation."""
    return images.float().div_(255).sub_(mean).div_(std)


def _taps(w: Tensor) -> tuple[int, ...]:
    return tuple(range(1, w.ndim))


def _scale(w: Tensor) -> Tensor:
    return w.abs().mean(dim=_taps(w), keepdim=True)
