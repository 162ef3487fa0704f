"""Pack what a machine with a card and no network lacks: `python tests/gpu/bundle.py --out DIR [--base FILE.gguf]`.

The machine has Python, CUDA's libraries and torch; it gets ONNX Runtime for CUDA, HAVOC's other libraries and the
model, cut into pieces small enough to be carried one at a time. `unpack.py` beside this file joins them there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

LACKING = (
    "onnxruntime-gpu",
    "jinja2",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "gguf",
    "pymoo",
    "moocore",
    "autograd",
    "cma",
    "alive-progress",
    "about-time",
    "graphemeu",
    "Deprecated",
    "cffi",
    "pycparser",
    "datasets",
    "dill",
    "multiprocess",
    "pytest-timeout",
)
"""Packages that an image with torch, transformers and pytest in it is taken to lack; their needs are among them."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Download, pack, cut; print what to do with the pieces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the pieces")
    parser.add_argument("--base", type=Path, help="a .gguf file to take along")
    parser.add_argument("--python", default="3.12", help="the version of Python there (default: 3.12)")
    parser.add_argument("--piece-mb", type=int, default=45, help="megabytes of a piece (default: 45)")
    args = parser.parse_args()
    if args.base is not None and not args.base.is_file():
        parser.error(f"--base {args.base}: no such file")
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        parser.error(f"--out {args.out}: the folder is not empty")
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        wheels = Path(scratch) / "wheels"
        _download(wheels, args.python)
        whole = Path(scratch) / "bundle.tar"
        with tarfile.open(whole, "w") as tar:
            for wheel in sorted(wheels.iterdir()):
                tar.add(wheel, f"wheels/{wheel.name}")
            if args.base is not None:
                tar.add(args.base.resolve(), "model.gguf")
        pieces = _cut(whole, args.out, args.piece_mb * 1_000_000)
    print(f"{len(pieces)} pieces of at most {args.piece_mb} MB in {args.out}")
    print("there: python3 tests/gpu/unpack.py --pieces DIR --env ENV, then ENV/bin/python tests/gpu/day.py --out DAY")
    return 0


def _download(wheels: Path, python: str) -> None:
    """Fetch the wheels, of the versions installed here, for the Python there; and make HAVOC's own, for its name."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    where = [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *where]
    subprocess.run([*pip, "download", "--no-deps", *wanted, "-d", wheels, *map(_pinned, LACKING)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)


def _pinned(name: str) -> str:
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def _cut(whole: Path, out: Path, most_bytes: int) -> list[Path]:
    pieces = []
    with whole.open("rb") as file:
        while part := file.read(most_bytes):
            pieces.append(out / f"piece.{len(pieces):02}")
            pieces[-1].write_bytes(part)
    return pieces


if __name__ == "__main__":
    sys.exit(main())
