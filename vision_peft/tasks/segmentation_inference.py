"""From what a network sees of a picture to probabilities at the picture's own size: whole pictures, or windows slid over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.data.geometry import Frame
from vision_peft.data.mask_dataset import Case

Network = Callable[[Tensor], Tensor]  # images (B, 3, S, S) -> embedding or mask logits, or one to the other


def whole(cases: Sequence[Case], encode: Network, decode: Network, device: torch.device) -> list[Tensor]:
    """Logits (K, H, W) of each case, its picture seen whole; a picture that several cases ask about is encoded once."""
    pictures = {case.record: case.image for case in cases}
    places = {record: place for place, record in enumerate(pictures)}
    embedding = encode(torch.stack([*pictures.values()]).to(device))
    logits = decode(embedding[[places[case.record] for case in cases]]).float().cpu()
    return [case.frame.restore(each) for case, each in zip(cases, logits)]


def sliding(case: Case, network: Network, device: torch.device, patch: int, size: int, overlap: float, batch: int) -> Tensor:
    """Logits (K, H, W) of a case whose picture is at its own size: windows of side `patch`, weighted by a Gaussian where they overlap."""
    from monai.inferers import sliding_window_inference

    predict = partial(_window, network=network, size=size)
    image = case.image[None].to(device)
    return sliding_window_inference(image, (patch, patch), batch, predict, overlap=overlap, mode="gaussian")[0].float().cpu()


def _window(images: Tensor, network: Network, size: int) -> Tensor:
    """Logits at the resolution of windows (B, 3, p, p) that the network sees at its own size."""
    side = images.shape[-1]
    frame = Frame.of(side, side, size, "squash")
    logits = network(torch.stack([frame.fit(image) for image in images]))
    return F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)


def probabilities(logits: Tensor) -> Tensor:
    """(K, H, W) in [0, 1]: of the one target, or of all classes, which then sum to one."""
    return logits.sigmoid() if logits.shape[0] == 1 else logits.softmax(0)
