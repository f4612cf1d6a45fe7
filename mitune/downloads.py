"""Data that is not shipped, into `data/`: `python -m mitune.downloads t2i-compbench` fetches and checks, `diffusiondb` draws from what lies there."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from mitune import commands, config, diffusiondb

COMPBENCH = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/examples/dataset"
SHA256 = {
    "color_train.txt": "db5d3287027d453f8c977f0c7315f8a01a770f02f61fa54ae19406762982393f",
    "color_val.txt": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "shape_train.txt": "451bdfccd330d4cf979d45664817be7959e89250b93d5c591cc562b858175a87",
    "shape_val.txt": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "texture_train.txt": "4846315c5972f9e9cc82e4833099e8ec2c28b999ca77269512715f3f56bde54f",
    "texture_val.txt": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
    "spatial_train.txt": "af14cdf2320057d98f94077e6211c2ddfaabfbb9e3842873657baabb17e00de6",
    "spatial_val.txt": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "non_spatial_train.txt": "dbac5a9ec83204dcd0c3538a12d3212e2ce66db6f7ba45b49a1d869b2d3f2430",
    "non_spatial_val.txt": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "complex_train.txt": "d214ac45cb3c5307dd14a144c8c69aa5ffdcc7be74ff71b5dac989f8ca9f924b",
    "complex_val.txt": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
}
"""Of T2I-CompBench's prompts at that commit (MIT licence)."""


def fetch(folder: Path, address: str, sha256: Mapping[str, str]) -> None:
    """The files of `address` in `folder`, all of them with these checksums or no folder at all. What an earlier attempt has fetched is kept beside it.

    Raises ValueError for an address that cannot be reached, a file of other content, and a folder that has other files of these names.
    """
    if folder.is_dir():
        if wrong := [name for name, wanted in sha256.items() if _sha256(folder / name) != wanted]:
            raise ValueError(f"{folder / wrong[0]} is missing or not the one of {address}: move {folder} away and try again")
        return
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    for name, wanted in sha256.items():
        if _sha256(part / name) != wanted:
            _download(f"{address}/{name}", part / name, f"or put the {len(sha256)} files of {address} into {folder}")
            if (found := _sha256(part / name)) != wanted:
                raise ValueError(f"{address}/{name} has SHA-256 {found}, not {wanted}: it is not the pinned file; try again, or check the proxy")
    for other in part.iterdir():
        if other.name not in sha256:
            other.unlink()
    part.rename(folder)


def _download(address: str, to: Path, otherwise: str) -> None:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer, to.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{address} cannot be reached ({getattr(error, 'reason', error)}): connect to the network and try again, {otherwise}") from None


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mitune.downloads", description=__doc__)
    parser.add_argument("name", choices=("t2i-compbench", "diffusiondb"))
    parser.add_argument("--images", type=commands.count, default=diffusiondb.IMAGES, help="diffusiondb: images a training prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="diffusiondb: of the sample (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    name = chosen.name
    folder = config.root() / "data" / name
    try:
        if name == "t2i-compbench":
            fetch(folder, COMPBENCH, SHA256)
            print(f"{folder}: {len(SHA256)} files, as pinned; set benchmark: t2i-compbench and prompts: data/t2i-compbench in params.yaml")
        else:
            drawn = diffusiondb.build(folder, images=chosen.images, seed=chosen.seed)
            counts = ", ".join(f"{n} {split}" for split, n in drawn["split"].value_counts().items())
            print(f"{folder / 'diffusiondb.parquet'}: {counts}; set benchmark: diffusiondb, prompts: its path, categories: [diffusiondb] in params.yaml")
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
