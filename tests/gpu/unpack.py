"""Put a bundle together on the machine with the card: `python3 tests/gpu/unpack.py --pieces DIR --env ENV`.

It makes an environment in ENV of this Python's own packages, but for ONNX Runtime, and of those in the bundle; HAVOC is
this checkout. The machine's own environment stays as it is. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "#!{python}\nimport sys\n\nfrom havoc_core.cli import main\n\nsys.exit(main())\n"


def main() -> int:
    """Join, unpack, link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=Path, required=True, help="the folder that holds piece.00, piece.01, ...")
    parser.add_argument("--env", type=Path, required=True, help="where to make the environment")
    args = parser.parse_args()
    pieces = sorted(args.pieces.glob("piece.*"))
    if [piece.name for piece in pieces] != [f"piece.{index:02}" for index in range(len(pieces))] or not pieces:
        parser.error(f"--pieces {args.pieces}: {len(pieces)} pieces there, and not all in a row from piece.00")
    venv.create(args.env, with_pip=False, clear=True)
    python = (args.env / "bin" / "python").absolute()
    site = args.env.absolute() / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    whole = args.env / "bundle.tar"
    with whole.open("wb") as file:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, file)
    with tarfile.open(whole) as tar:
        tar.extractall(args.env, filter="data")
    whole.unlink()
    for wheel in sorted((args.env / "wheels").iterdir()):
        with zipfile.ZipFile(wheel) as archive:
            is_havoc = wheel.name.startswith("havoc_core")
            names = [name for name in archive.namelist() if not is_havoc or ".dist-info/" in name]
            archive.extractall(site, names)
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not (site / entry.name).exists() and not entry.name.startswith(("onnxruntime", "havoc", "__editable__")):
            (site / entry.name).symlink_to(entry)
    (site / "havoc_core").symlink_to(ROOT)
    script = args.env / "bin" / "havoc"
    script.write_text(SCRIPT.format(python=python))
    script.chmod(0o755)
    print(f"{args.env}: {len(pieces)} pieces, HAVOC from {ROOT}; {python} tests/gpu/day.py --out DAY")
    return 0


if __name__ == "__main__":
    sys.exit(main())
