"""A CLIP in open_clip's format without any of CLIP's data: DINOv2 ViT-S/14 and MiniLM, aligned by distillation on tinyimagenet100.

    VISION_PEFT_DATA=... python scripts/build_offline_clip.py --folder checkpoints/offline_clip
    VISION_PEFT_DATA=... python scripts/build_offline_clip.py --folder checkpoints/offline_clip_held_out --hold_out
    vision-peft validate --config configs/task/fewshot_clip.yaml --model.backbone.name local-dir:checkpoints/offline_clip ...

Teacher: EfficientNet-Lite0's posterior p over ImageNet's 1000 classes (with the texts T of their names, the offline dual encoder).
Student: the image tower f and a projection, on the same views of the 2500 training and validation pictures (never the test ones):

    start      visual.proj by ridge regression from pooled features to the unit vector of sum_c p_c T_c
    then       KL(p || softmax(s cos(f, T))) + CE(label | softmax(s cos(f, texts of the 100 classes))),    s trained

The text tower is fixed but for its centre: the mean of ImageNet's class names is put at the origin. Views are drawn and the teacher is
asked once (kept in FOLDER/work); training writes FOLDER/work/last.pt every epoch. The same command goes on where it was stopped.
--hold_out trains without every fifth class and prints zero-shot accuracy on these: by it the settings below were chosen.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from vision_peft.backbones import Clip, DualEncoder, minilm
from vision_peft.backbones.clip_from_parts import PREPROCESS, SIZE, centre_text, network_from_parts, write_folder
from vision_peft.backbones.dual_encoder import TEMPLATES
from vision_peft.data.csv_source import CsvSource
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.user_cache import keep_tensors

VIEWS, TEACHER_SIZE, SMALLEST_CROP = 12, 160, 0.3
EPOCHS, BATCH, RATE, DECAY, WARMUP, RIDGE, SCALE = 4, 64, 5e-5, 0.05, 30, 0.1, 20.0
PROMPT = "a photo of a {}."
MEAN, STD = (torch.tensor(PREPROCESS[key])[:, None, None] for key in ("mean", "std"))


@dataclass
class Pictures:
    """Pictures (N, 3, 64, 64) uint8, labels (N,), names of the classes."""

    images: Tensor
    labels: Tensor
    names: list[str]

    @classmethod
    def read(cls) -> Pictures:
        source = CsvSource("tinyimagenet100/split.csv").read()
        records = [*source.train, *source.val]
        images = torch.stack([pil_to_tensor(Image.open(record.path).convert("RGB")) for record in records])
        return cls(images, torch.tensor([record.label for record in records]), list(source.class_names))

    def view(self, rows: Tensor, boxes: Tensor, size: int) -> Tensor:
        """Crops (B, 3, size, size) in [0, 1] of the pictures `rows` by affine maps (B, 2, 3)."""
        grid = F.affine_grid(boxes, [len(rows), 3, size, size], align_corners=False)
        cropped = F.grid_sample(self.images[rows] / 255, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        return cropped.clamp(0, 1)


def draw_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Affine maps (count, 2, 3) of random crops, half of them mirrored."""
    side = (torch.rand(count, generator=generator) * (1 - SMALLEST_CROP) + SMALLEST_CROP).sqrt()
    centre = (torch.rand(2, count, generator=generator) * 2 - 1) * (1 - side)
    boxes = torch.zeros(count, 2, 3)
    boxes[:, 0, 0] = side * ((torch.rand(count, generator=generator) < 0.5) * 2 - 1)
    boxes[:, 1, 1], boxes[:, 0, 2], boxes[:, 1, 2] = side, centre[0], centre[1]
    return boxes


def teach(pictures: Pictures, work: Path) -> list[dict[str, Tensor]]:
    """Per view the boxes (N, 2, 3) and the teacher's logits (N, 1000)."""
    views, teacher = [], None
    for number in tqdm(range(VIEWS), "views seen by the teacher"):
        path = work / f"view-{number}.safetensors"
        if not path.is_file():
            if teacher is None:
                backbone = DualEncoder()
                backbone.load()
                teacher = backbone.eval().network.visual.trunk.to(memory_format=torch.channels_last)
            boxes = draw_boxes(len(pictures.images), torch.Generator().manual_seed(number))
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                batches = torch.arange(len(boxes)).split(50)
                crops = (pictures.view(rows, boxes[rows], TEACHER_SIZE) for rows in batches)
                logits = [teacher(((crop - 0.5) / 0.5).to(memory_format=torch.channels_last)).float() for crop in crops]
            keep_tensors(path, {"boxes": boxes, "logits": torch.cat(logits)})
        views.append(load_file(path))
    return views


@torch.no_grad()
def texts(network: nn.Module, work: Path) -> tuple[Tensor, Tensor]:
    """The mean (384,) of ImageNet's class names, and unit vectors (1000, 384) of its classes once that is the origin."""
    path = work / "texts.safetensors"
    if not path.is_file():
        info = ImageNetInfo()
        synonyms = [info.index_to_description(index) for index in range(1000)]
        firsts = [names.split(",")[0] for names in synonyms]
        prompts = [[template.format(name) for name in names] for names in (firsts, synonyms) for template in TEMPLATES]
        features = [encode(network, each) for each in tqdm(prompts, "names of ImageNet's classes")]
        keep_tensors(path, {"features": torch.stack(features)})
    features = load_file(path)["features"]  # (6, 1000, 384)
    centre = features.mean((0, 1))
    return centre, F.normalize(F.normalize(features - centre, dim=-1).sum(0), dim=-1)


def encode(network: nn.Module, prompts: list[str]) -> Tensor:
    return torch.cat([network.encode_text(minilm.tokenize(prompts[at : at + 50])) for at in range(0, len(prompts), 50)])


def student(network: nn.Module, crops: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network.visual((crops - MEAN) / STD).float()


@torch.no_grad()
def start_projection(network: nn.Module, pictures: Pictures, rows: Tensor, views: list[dict[str, Tensor]], classes: Tensor) -> None:
    """proj = argmin |X proj - Z|^2 + ridge |proj|^2 over two views; the mean feature goes into the last norm's bias."""
    batches = [(view, batch) for view in views[:2] for batch in rows.split(100)]
    crops = (pictures.view(batch, view["boxes"][batch], SIZE) for view, batch in batches)
    X = torch.cat([student(network, each) for each in tqdm(crops, "features for the start", total=len(batches))])
    Z = torch.cat([F.normalize(view["logits"][batch].softmax(-1) @ classes, dim=-1) for view, batch in batches])
    network.visual.ln_post.bias.sub_(X.mean(0))
    X = X - X.mean(0)
    gram = X.mT @ X
    network.visual.proj.copy_(torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), X.mT @ Z))


def train(network: nn.Module, pictures: Pictures, rows: Tensor, views: list[dict[str, Tensor]], classes: Tensor, work: Path) -> float:
    """Distil into the image tower; returns the trained scale of the cosine."""
    seen = pictures.labels[rows].unique()
    column = torch.full((len(pictures.names),), -1).index_put_((seen,), torch.arange(len(seen)))
    with torch.no_grad():
        own = F.normalize(encode(network, [PROMPT.format(pictures.names[c]) for c in seen]), dim=-1)
    tower = network.visual.requires_grad_(True)
    scale = nn.Parameter(torch.tensor(SCALE).log())
    plain = [p for name, p in tower.named_parameters() if p.ndim <= 1 or name == "proj"]
    matrices = [p for name, p in tower.named_parameters() if not any(p is each for each in plain)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": plain}, {"params": [scale], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
    steps = EPOCHS * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2
    )
    last, first = work / "last.pt", 0
    if last.is_file():
        state = torch.load(last, weights_only=True)
        tower.load_state_dict(state["tower"])
        scale.data.copy_(state["scale"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, EPOCHS):
        view = views[epoch % VIEWS]
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))]
        bar = tqdm(order.split(BATCH)[: len(rows) // BATCH], f"epoch {epoch + 1} of {EPOCHS}")
        for batch in bar:
            features = F.normalize(student(network, pictures.view(batch, view["boxes"][batch], SIZE)), dim=-1)
            posterior = view["logits"][batch].softmax(-1)
            loss = F.kl_div((scale.exp() * features @ classes.mT).log_softmax(-1), posterior, reduction="batchmean")
            loss = loss + F.cross_entropy(scale.exp() * features @ own.mT, column[pictures.labels[batch]])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{scale.exp().item():.1f}")
        state = {"tower": tower.state_dict(), "scale": scale.data, "optimizer": optimizer.state_dict()}
        torch.save({**state, "schedule": schedule.state_dict(), "epoch": epoch + 1}, last.with_suffix(".partial"))
        last.with_suffix(".partial").replace(last)
    network.requires_grad_(False)
    return scale.exp().item()


@torch.no_grad()
def zero_shot(backbone: Clip | DualEncoder, file: str) -> tuple[float, int]:
    """Top-1 on a set's test split with one template, and the number of classes."""
    data = FewShotImages(CsvSource(file), shots=1, template=PROMPT)
    data.preprocess = backbone.preprocess
    data.setup("test")
    text = F.normalize(backbone.text_features(data.prompts(), frozen=True), dim=1)
    right = 0
    for images, labels in DataLoader(data.test_dataset, batch_size=64):
        with torch.autocast("cpu", torch.bfloat16):
            features = backbone(images)
        right += (F.normalize(features.float(), dim=1) @ text.mT).argmax(1).eq(labels).sum().item()
    return right / len(data.test_records), len(data.class_names)


@torch.no_grad()
def held_out_accuracy(network: nn.Module, pictures: Pictures, rows: Tensor) -> float:
    """Zero-shot among the classes that were kept away, on whole pictures."""
    kept = pictures.labels[rows].unique()
    text = F.normalize(encode(network, [PROMPT.format(pictures.names[c]) for c in kept]), dim=-1)
    whole = torch.eye(2, 3)
    found = [student(network, pictures.view(batch, whole.expand(len(batch), 2, 3), SIZE)) @ text.mT for batch in rows.split(100)]
    return (kept[torch.cat(found).argmax(1)] == pictures.labels[rows]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/offline_clip"))
    parser.add_argument("--hold_out", action="store_true", help="keep every fifth class away and test on these")
    args = parser.parse_args()
    start, work = time.process_time(), args.folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    torch.manual_seed(0)

    pictures = Pictures.read()
    views = teach(pictures, work)
    network = network_from_parts()
    centre, classes = texts(network, work)
    centre_text(network, centre)
    kept_away = pictures.labels % 5 == 2 if args.hold_out else torch.zeros_like(pictures.labels, dtype=torch.bool)
    rows, others = (~kept_away).nonzero()[:, 0], kept_away.nonzero()[:, 0]
    start_projection(network, pictures, rows, views, classes)
    if args.hold_out:
        print(f"zero-shot among {len(pictures.labels[others].unique())} classes kept away, after the ridge start: "
              f"{held_out_accuracy(network, pictures, others):.3f}")  # fmt: skip
    scale = train(network, pictures, rows, views, classes, work)
    network.logit_scale.data.fill_(math.log(scale))
    if args.hold_out:
        print(f"after {EPOCHS} epochs: {held_out_accuracy(network, pictures, others):.3f}")
    write_folder(network.eval(), args.folder)
    print(f"{args.folder}: {sum(p.numel() for p in network.parameters()):,} parameters, {time.process_time() - start:.0f} CPU seconds")

    ours, untrained = Clip(f"local-dir:{args.folder}"), DualEncoder()
    for backbone in (ours, untrained):
        backbone.load()
        backbone.eval()
    print(f"{'zero-shot, test split':24s} {'chance':>7s} {'aligned':>8s} {'(a)':>6s}")
    for name, note in (("tinyimagenet100", "classes seen in alignment"), ("caltech101", "never seen"), ("dtd10", "never seen")):
        accuracy, count = zero_shot(ours, f"{name}/split.csv")
        print(f"{name:24s} {100 / count:6.1f}% {100 * accuracy:7.1f}% {100 * zero_shot(untrained, f'{name}/split.csv')[0]:5.1f}%  {note}")


if __name__ == "__main__":
    main()
