"""What a promptable network is asked, made from the truth in training and in evaluation: nothing, points, a box, a rough mask, a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.backbones.segmentation import Prompts, SegmentationBackbone
from vision_peft.errors import UserError

SURE = 8.0  # logit of a mask prompt's inside


class Prompting(nn.Module, ABC):
    """Makes Prompts of B targets. All draws follow from the items' own numbers, so evaluation asks the same at every run."""

    needs_target = True  # False where prediction can do without a mask

    def build(self, backbone: SegmentationBackbone, class_name: str) -> None:
        """Called once, with the backbone loaded."""
        self.side = backbone.preprocess.size

    @abstractmethod
    def forward(self, targets: Tensor, draws: list[int]) -> Prompts:
        """Prompts of targets (B, s, s) of 0 and 1 that cover the network's input, and a number an item that draws follow from."""


class NoPrompt(Prompting):
    """SAM's learned embedding for the absence of prompts: segment what training showed."""

    needs_target = False

    def forward(self, targets: Tensor, draws: list[int]) -> Prompts:
        return Prompts()


class PointPrompt(Prompting):
    """Random pixels of the target, and of its surroundings; an empty target gets background points alone.

    Args:
        positive, negative: how many, at least one positive.
    """

    def __init__(self, positive: int = 1, negative: int = 0) -> None:
        super().__init__()
        if positive < 1 or negative < 0:
            raise UserError("model.prompt: PointPrompt takes at least one positive point and no negative number of negative ones")
        self.positive, self.negative = positive, negative

    def forward(self, targets: Tensor, draws: list[int]) -> Prompts:
        scale = self.side / targets.shape[-1]
        points, labels = [], []
        for target, draw in zip(targets, draws):
            generator = torch.Generator().manual_seed(draw)
            inside = target.bool().cpu()
            own = [(inside, 1)] * self.positive if inside.any() else [(~inside, 0)] * self.positive
            chosen = own + [(~inside if not inside.all() else inside, int(bool(inside.all())))] * self.negative
            points.append(torch.stack([_pixel(where, generator) for where, _ in chosen]))
            labels.append(torch.tensor([label for _, label in chosen]))
        centres = (torch.stack(points) + 0.5) * scale - 0.5
        return Prompts(points=centres.to(targets.device), labels=torch.stack(labels).to(targets.device))


class BoxPrompt(Prompting):
    """The tight box around the target, moved a little; an empty target gets the whole picture.

    Args:
        jitter: largest move in pixels of an input of 1024, in proportion for others.
        how: `outwards`, each side by its own amount (MedSAM); `shift`, both corners by one amount (SAM-Med2D).
    """

    def __init__(self, jitter: float = 20.0, how: Literal["outwards", "shift"] = "outwards") -> None:
        super().__init__()
        if jitter < 0:
            raise UserError(f"model.prompt.jitter: must be at least 0, not {jitter}")
        self.jitter, self.how = jitter, how

    def forward(self, targets: Tensor, draws: list[int]) -> Prompts:
        scale, largest = self.side / targets.shape[-1], self.jitter * self.side / 1024
        boxes = torch.stack([self._box(target, draw, scale, largest) for target, draw in zip(targets, draws)])
        return Prompts(boxes=boxes.clamp(0, self.side - 1).to(targets.device))

    def _box(self, target: Tensor, draw: int, scale: float, largest: float) -> Tensor:
        rows, columns = (target.any(axis).nonzero()[:, 0] for axis in (1, 0))
        if not len(rows):
            return torch.tensor([0.0, 0.0, self.side - 1, self.side - 1])
        tight = torch.stack([columns[0], rows[0], columns[-1], rows[-1]]).float().cpu()
        tight = (tight + 0.5) * scale - 0.5
        generator = torch.Generator().manual_seed(draw)
        if self.how == "shift":
            size = torch.min(tight[2] - tight[0], tight[3] - tight[1])
            reach = torch.clamp(size / 2, max=largest)
            return tight + ((2 * torch.rand(2, generator=generator) - 1) * reach).repeat(2)
        return tight + torch.rand(4, generator=generator) * largest * torch.tensor([-1.0, -1.0, 1.0, 1.0])


class MaskPrompt(Prompting):
    """A rough guess of the mask, as logits: the truth grown or shrunk by up to `reach` cells of the mask's grid.

    Args:
        reach: in cells; 0 gives the truth itself.
    """

    def __init__(self, reach: int = 3) -> None:
        super().__init__()
        if reach < 0:
            raise UserError(f"model.prompt.reach: must be at least 0, not {reach}")
        self.reach = reach

    def build(self, backbone: SegmentationBackbone, class_name: str) -> None:
        super().build(backbone, class_name)
        self.size = backbone.mask_size

    def forward(self, targets: Tensor, draws: list[int]) -> Prompts:
        small = F.interpolate(targets[:, None].float(), self.size, mode="nearest-exact")
        rough = []
        for mask, draw in zip(small, draws):
            steps = int(torch.randint(-self.reach, self.reach + 1, (1,), generator=torch.Generator().manual_seed(draw)))
            for _ in range(abs(steps)):
                mask = F.max_pool2d(mask, 3, 1, 1) if steps > 0 else -F.max_pool2d(-mask, 3, 1, 1)
            rough.append(mask)
        return Prompts(masks=SURE * (2 * torch.stack(rough) - 1))


class ClassText(Prompting):
    """The class's name as one token: a frozen text encoder's feature through a trained Linear, ReLU and BatchNorm (S-SAM, SALT).

    Args:
        encoder: `offline:minilm_l6`, or an open_clip name whose text tower reads the name.
        weights: open_clip's tag or file; null for the offline encoder.
        text: what is read; null takes the class's name alone.
    """

    needs_target = False

    def __init__(self, encoder: str = "offline:minilm_l6", weights: str | None = None, text: str | None = None) -> None:
        super().__init__()
        self.encoder, self.weights, self.text = encoder, weights, text

    def build(self, backbone: SegmentationBackbone, class_name: str) -> None:
        super().build(backbone, class_name)
        feature = self._feature(self.text or class_name)  # (D,)
        self.register_buffer("feature", feature)
        width = backbone.num_features
        self.affine = nn.Sequential(nn.Linear(len(feature), width), nn.ReLU(), nn.BatchNorm1d(width))

    @torch.no_grad()
    def _feature(self, text: str) -> Tensor:
        from vision_peft.backbones.text_feature import text_feature

        return text_feature(self.encoder, self.weights, text)

    def forward(self, targets: Tensor, draws: list[int]) -> Prompts:
        # one name for all: BatchNorm would subtract the token from itself, so that its running statistics stay as they began
        self.affine[2].eval()
        token = self.affine(self.feature[None])
        return Prompts(tokens=token.expand(len(targets), -1)[:, None])


def _pixel(where: Tensor, generator: torch.Generator) -> Tensor:
    """x, y of a random True pixel of (s, s)."""
    places = where.nonzero()
    row, column = places[int(torch.randint(len(places), (1,), generator=generator))].tolist()
    return torch.tensor([column, row], dtype=torch.float32)


def prompt_part(prompting: Prompting) -> dict[str, Any]:
    """The trained part of a prompting, if it has one."""
    return {"prompt": prompting} if any(parameter.requires_grad for parameter in prompting.parameters()) else {}
