"""`vision-peft sample`: pictures of a generator from the same seeds, frozen, with each adapter, and with a mix of several.

  vision-peft sample checkpoints/smile --output smile.png
  vision-peft sample checkpoints/smile checkpoints/sunglasses --weights 0.5 0.5 --output mix.png --html mix.html
  vision-peft sample --backbone checkpoints/offline_ddpm/pipeline --output base.png
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vision_peft.commands.networks import find_folders, rebuild
from vision_peft.commands.parser import CommandParser
from vision_peft.errors import UserError


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run or adapter folders, of one generator")
    parser.add_argument("--backbone", help="folder, file or hub name of a generator, without adapters")
    parser.add_argument("--weights", nargs="+", type=float, help="of the adapters in a mix, which gets a row of its own")
    parser.add_argument("--output", type=Path, required=True, help="the grid, a .png")
    parser.add_argument("--html", type=Path, help="also a page with the grid and what its rows are")
    parser.add_argument("--pictures", type=Path, help="also every picture, in a folder a row")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", nargs="+", default=[""], help="in turn; class numbers for a model of classes")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--scheduler", help="class name in diffusers, instead of the model's")
    given = parser.parse_args(argv)
    if bool(given.folders) == (given.backbone is not None):
        raise UserError("sample: give run or adapter folders, or --backbone")
    if given.weights is not None and len(given.weights) != len(given.folders):
        raise UserError(f"--weights: {len(given.weights)} for {len(given.folders)} adapters")
    if given.output.suffix != ".png":
        raise UserError(f"--output: {given.output} is no .png")
    for name in ("count", "steps"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name}: must be at least 1, not {getattr(given, name)}")

    from vision_peft.report.grid_page import write_page
    from vision_peft.report.picture_grid import save_grid

    rows, told = _rows(given)
    save_grid(rows, given.output)
    print(f"grid: {given.output}")
    if given.html is not None:
        names = ("count", "seed", "steps", "guidance", "prompts")
        write_page(given.output, told, {name: getattr(given, name) for name in names}, given.html)
        print(f"page: {given.html}")
    if given.pictures is not None:
        for title, pictures in rows.items():
            _save_each(pictures, given.pictures / title.replace("/", "_"))
        print(f"pictures: {given.pictures}")


@torch.no_grad()
def _rows(given: object) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Pictures (count, 3, H, W) in [-1, 1] by row title, and what each row is."""
    from vision_peft.backbones.diffusion import Diffusion
    from vision_peft.engine.install import activate, adapters_off
    from vision_peft.engine.store import load_adapter, read_config
    from vision_peft.generation.acts import ALWAYS, Acts, acts_of
    from vision_peft.generation.sampling import draw_noise, pictures

    if given.backbone is not None:
        backbone = Diffusion(given.backbone, scheduler=given.scheduler)
    else:
        backbone = rebuild(*find_folders(given.folders[0]))
        if not isinstance(backbone, Diffusion):
            raise UserError(f"{given.folders[0]}: adapts a {type(backbone).__name__}, which generates nothing")
        if given.scheduler is not None:
            own = {name: getattr(backbone, name) for name in ("config", "pretrained", "autoencoder")}
            backbone = Diffusion(backbone.name, scheduler=given.scheduler, **own)
    backbone.load()
    backbone.eval()
    noise = draw_noise(backbone, given.count, given.seed)
    prompts = [given.prompts[index % len(given.prompts)] for index in range(given.count)]

    def show(acts: Acts = ALWAYS) -> Tensor:
        return pictures(backbone, noise, prompts, given.steps, given.guidance, given.seed, acts)

    titles: dict[str, Path] = {}
    acts: dict[str, Acts] = {}
    for folder in given.folders:
        adapter, _ = find_folders(folder)
        title = folder.name if folder.name not in (*titles, "frozen", "mix") else str(folder)
        load_adapter(backbone.network, adapter, sites=backbone.sites(), name=title, resized=backbone.resized)
        titles[title] = adapter
        acts[title] = acts_of(read_config(adapter), adapter)
    told = {"frozen": backbone.name} | {title: str(path) for title, path in titles.items()}
    wanted: list[tuple[str, dict[str, float]]] = [("frozen", {})] + [(title, {title: 1.0}) for title in titles]
    if given.weights is not None:
        mix = dict(zip(titles, given.weights))
        wanted.append(("mix", mix))
        told["mix"] = " + ".join(f"{weight:g} x {title}" for title, weight in mix.items())
    rows = {}
    for title, mix in tqdm(wanted, desc="rows", disable=len(wanted) == 1):
        if mix:
            activate(backbone.network, mix)
            spans = [acts[each] for each in mix]
            rows[title] = show((min(low for low, _ in spans), max(high for _, high in spans)))
        else:
            with adapters_off(backbone.network):
                rows[title] = show()
    return rows, told


def _save_each(pictures: Tensor, folder: Path) -> None:
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        save_image(picture / 2 + 0.5, folder / f"{index:04d}.png")
