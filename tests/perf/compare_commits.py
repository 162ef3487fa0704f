"""Is this checkout slower than another commit? Both export nano and are measured in lockstep, in one run.

    .venv/bin/python tests/perf/compare_commits.py COMMIT      (make compare BASE=COMMIT)

The other commit's tree is unpacked into a temporary folder; this checkout takes part as it lies there, uncommitted
changes included. Each side has an interpreter of its own that finds the libraries of this environment, and `havoc_core`
in its own tree; so do the processes that it starts. Exit 1 only where slower by more than the margin is proven; 0 also
where it is undecided, or where the other commit does not run here: neither is a defect of the change. Exit 2 where the
comparison cannot be made at all, 4 where this side does not run.
"""

from __future__ import annotations

import argparse
import io
import signal
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

from havoc_core.bench.judge.paired import judge_blocks, verdict_of
from havoc_core.bench.lockstep import NUM_BLOCKS, Side, measure_in_lockstep
from havoc_core.bench.report.tables import paired_table
from havoc_core.errors import HavocError, MeasurementError
from havoc_core.progress import make_progress
from havoc_core.storage import scratch_directory

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = (":!tests", ":!docs", ":!reports", ":!*.md", ":!.github", ":!.ci", ":!Makefile")
MARGIN = 0.10
BUDGET_S = 110.0


def git(*words: str, root: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    """Run git in a checkout; its exit code is the caller's to look at."""
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)
    except FileNotFoundError:
        raise HavocError("git is not installed: it holds the commit to compare with") from None


def commit_of(name: str, root: Path = ROOT) -> str:
    """Return the hash of a commit by any of its names."""
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", root=root)
    if found.returncode:
        raise HavocError(f"no commit {name!r} here: fetch it first (a shallow clone holds only the last ones)")
    return found.stdout.decode().strip()


def is_same_code(commit: str, root: Path = ROOT) -> bool:
    """Whether nothing that runs differs between a commit and the checkout."""
    return git("diff", "--quiet", commit, "--", ".", *NOT_RUN, root=root).returncode == 0


def unpack(commit: str, folder: Path, root: Path = ROOT) -> Path:
    """Write the tree of a commit into a new folder. Nothing is noted in the repository, so nothing can stay there."""
    packed = git("archive", "--format=tar", commit, root=root)
    if packed.returncode:
        raise HavocError(f"git cannot unpack {commit[:12]}: {packed.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def side_of(name: str, tree: Path, folder: Path) -> Side:
    """Make an interpreter that imports `havoc_core` from `tree`, and say where its artifact will be.

    A path file brings in the code and this environment's libraries. The path files of those are not read, so an
    installation in editable mode does not answer for the package; and isolated children read it too.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder / "venv")
    (folder / "code").mkdir()
    (folder / "code" / "havoc_core").symlink_to(tree.resolve())
    (home,) = (folder / "venv" / "lib").glob("python3.*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (home / "side.pth").write_text("\n".join(map(str, [(folder / "code").resolve(), *libraries])) + "\n")
    return Side(name=name, artifact=folder / "artifact", python=folder / "venv" / "bin" / "python")


def export(side: Side) -> None:
    """Export nano with the side's own code; what goes wrong is a `MeasurementError` under its name."""
    command = [side.python, "-I", "-m", "havoc_core", "export", "nano", "--out", side.artifact]
    done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise MeasurementError(f"{side.name} does not export nano (exit code {done.returncode}): {lines[-1]}")


def prepare(side: Side) -> None:
    """Export, and run a block against itself that does not count: it compiles modules and fills the page cache."""
    export(side)
    measure_in_lockstep(side, side, num_blocks=1, num_exchanges=1)


def compare(name: str, *, num_blocks: int, margin: float, budget_s: float, root: Path = ROOT) -> int:
    """Compare a checkout with a commit and print what came of it; return the exit code."""
    began = time.monotonic()
    commit = commit_of(name, root)
    if is_same_code(commit, root):
        print(f"SAME: nothing that runs differs from {commit[:12]}")
        return 0
    with scratch_directory("havoc-compare-") as folder:
        for part in ("base", "here"):
            (folder / part).mkdir()
        base = side_of(f"commit {commit[:12]}", unpack(commit, folder / "tree", root), folder / "base")
        here = side_of("this checkout", root, folder / "here")
        try:
            prepare(base)
        except HavocError as error:
            print(f"NOT COMPARED: {error}")
            return 0
        prepare(here)
        left_s = budget_s - (time.monotonic() - began)
        blocks = measure_in_lockstep(base, here, num_blocks=num_blocks, budget_s=left_s, progress=make_progress())
    rows = judge_blocks(blocks, margin=margin)
    word = verdict_of(rows)
    print(paired_table(word, rows, margin, names=("base", "here")))
    return int(word == "worse")


def main() -> int:
    """Compare as asked."""
    parser = argparse.ArgumentParser(description="compare this checkout with another commit, measured in lockstep")
    parser.add_argument("commit")
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS)
    parser.add_argument("--margin", type=float, default=MARGIN, help="how much slower is allowed, 0.1 for 10 %%")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="measure no block that would end after it")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through the `with` blocks, as Ctrl-C does
    try:
        return compare(chosen.commit, num_blocks=chosen.blocks, margin=chosen.margin, budget_s=chosen.budget_s)
    except HavocError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
