"""Nothing that was written is lost, and nothing is half-written: full disks, missing rights, kill -9 at any moment."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from havoc_core import storage
from havoc_core.errors import HavocError
from havoc_core.storage import Journal, new_directory, open_atomic, read_json, write_json, write_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé☃\n\0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
IS_ROOT = os.geteuid() == 0
NUM_KILLS = 12


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def run_child(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def kill_at_random_moments(script: str, *arguments: object) -> Iterator[None]:
    """Start the child, wait until it works, kill -9 it somewhere within the next 30 ms; then the caller looks."""
    rng = random.Random(0)
    for _ in range(NUM_KILLS):
        child = run_child(script, *arguments)
        assert child.stdout
        assert child.stdout.readline() == "working\n"
        time.sleep(rng.random() * 0.03)
        child.kill()
        child.communicate()
        yield


# --- JSON and hashes


@given(JSON)
def test_canonical_json_is_one_form(value: object) -> None:
    """Equal values have equal bytes, whatever the order of their keys, and read back equal."""
    shuffled = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert storage.canonical_json(value) == storage.canonical_json(shuffled)
    assert json.loads(storage.canonical_json(value)) == value


def test_hashes_are_sha256(tmp_path: Path) -> None:
    """Anyone can check a hash with sha256sum."""
    data = random.Random(0).randbytes(3_000_000)
    storage.write_bytes(tmp_path / "file", data)
    assert storage.sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert storage.sha256_json({"b": 1, "a": "é"}) == hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()


@settings(max_examples=30)
@given(JSON)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    """What is written is read back equal, and no temporary file stays."""
    folder = tmp_path_factory.mktemp("json")
    write_json(folder / "new" / "value.json", value)
    assert read_json(folder / "new" / "value.json") == value
    assert left_behind(folder / "new") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"x": [float("-inf")]}])
def test_numbers_json_does_not_have_are_refused(tmp_path: Path, value: object) -> None:
    """NaN never reaches a file, and the old content stays."""
    write_json(tmp_path / "v.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-1e999]", "-1e999 is too large for a number of 64 bits"),
        (b"\xff\xfe{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-8-sig"), "byte order mark: save it as UTF-8 without one"),
        ('{"a": 1}'.encode("utf-16-le"), "Expecting property name"),
        (b'{"a": "\xe4"}', "utf-8"),
        (b'[{"a": 1, "b": {"c": 2, "c": 2}}]', "the key 'c' occurs twice in one object"),
        (b"[" * 100_000, "nested too deep|recursion"),
        (b"9" * 5000, "digits"),
    ],
)
def test_a_bad_json_file_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    """Truncated, not JSON, not UTF-8, too deep: one line that names the file."""
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(HavocError, match=reason) as caught:
        read_json(tmp_path / "bad.json")
    assert str(caught.value).startswith(str(tmp_path / "bad.json"))


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    """The first mistake anyone makes is explained."""
    with pytest.raises(HavocError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(HavocError, match="not a regular file"):
        read_json(tmp_path)


# --- one file


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A reader sees the old content or the new, never a part."""
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), open_atomic(tmp_path / "file") as file:
        file.write(b"ne")
        _ = 1 / 0
    assert (tmp_path / "file").read_text() == "old"
    assert left_behind(tmp_path) == []


def test_an_error_is_blamed_on_the_file_it_is_about(tmp_path: Path) -> None:
    """A missing input, met while the output is open, is not reported as a problem of the output."""
    with pytest.raises(HavocError, match="input: No such file"), open_atomic(tmp_path / "out") as file:
        file.write((tmp_path / "input").read_bytes())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/", "..", "../../../../../../../../../../.."])
def test_a_path_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """`--out /` and its like end in a sentence, not a traceback."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HavocError), new_directory(Path(path), marker="manifest.json"):
        pass


def test_writes_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare file name is enough."""
    monkeypatch.chdir(tmp_path)
    write_text(Path("file"), "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is what a full disk looks like, and is not here")
def test_a_full_disk_is_explained() -> None:
    """The reader learns what to do, not an errno."""
    with pytest.raises(OSError, match="No space") as caught, Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")
    assert "the disk is full" in str(storage.explained(caught.value, "out"))
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "the disk is full" in str(storage.explained(quota, "out"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights this user lacks")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def fill_folder(path: Path) -> None:
    with new_directory(path, marker="m") as building:
        write_text(building / "m", "x" * 300_000)


@pytest.mark.skipif(not IS_ROOT, reason="mounting a small disk needs root")
def test_a_really_full_disk_keeps_the_old_content(small_disk: Path) -> None:
    """File, folder and journal survive: old content whole, nothing half-written; work goes on once there is room."""
    journal = Journal(small_disk / "journal.jsonl")
    journal.append({"n": 0})
    write_json(small_disk / "value.json", "old")
    with new_directory(small_disk / "folder", marker="m") as building:
        write_text(building / "m", "old")

    with pytest.raises(HavocError, match=r"value.json: the disk is full"):
        write_json(small_disk / "value.json", "x" * 300_000)
    with (
        pytest.raises(HavocError, match=r"folder.*: the disk is full"),
        new_directory(small_disk / "folder", marker="m") as b,
    ):
        write_text(b / "m", "x" * 300_000)
    with pytest.raises(HavocError, match=r"journal.jsonl: the disk is full"):
        journal.append({"n": 1, "text": "x" * 300_000})
    journal.append({"n": 2})

    assert read_json(small_disk / "value.json") == "old"
    assert (small_disk / "folder" / "m").read_text() == "old"
    assert Journal(small_disk / "journal.jsonl").entries == journal.entries == [{"n": 0}, {"n": 2}]
    assert left_behind(small_disk) == []


def test_a_write_that_the_system_cuts_short_is_taken_back(tmp_path: Path) -> None:
    """A file-size limit stops a journal line in the middle: the line is cut off again and the journal goes on."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        from havoc_core.errors import HavocError
        from havoc_core.storage import Journal, write_json
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        journal = Journal(Path(sys.argv[1]) / "journal.jsonl")
        journal.append({"n": 0})
        for write in (
            lambda: journal.append({"n": 1, "text": "x" * 2000}),
            lambda: write_json(journal.path.with_name("v"), "x" * 2000),
        ):
            try:
                write()
            except HavocError as error:
                print(error)
        journal.append({"n": 2})
    """
    out, err = run_child(script, tmp_path).communicate(timeout=60)
    assert (out.count("File too large"), err) == (2, "")
    assert Journal(tmp_path / "journal.jsonl").entries == [{"n": 0}, {"n": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_missing_rights_are_explained() -> None:
    """A read-only folder gives one line that names it and says what to do."""
    script = """
        import os, sys
        from pathlib import Path
        from havoc_core.errors import HavocError
        from havoc_core.storage import Journal, new_directory, write_text
        if os.geteuid() == 0:
            os.setuid(65534)
        folder = Path(sys.argv[1])
        for attempt in (
            lambda: write_text(folder / "file", "x"),
            lambda: Journal(folder / "journal").append({}),
            lambda: new_directory(folder / "new", marker="m").__enter__(),
        ):
            try:
                attempt()
            except HavocError as error:
                print(error)
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        out, err = run_child(script, folder).communicate(timeout=60)
    assert (out.count("no permission (Permission denied); choose another --out"), err) == (3, "")


def test_kill_9_never_tears_a_file(tmp_path: Path) -> None:
    """Killed at any moment, the file on disk is one whole document that was written."""
    script = """
        import sys
        from pathlib import Path
        from havoc_core.storage import write_json
        path = Path(sys.argv[1]) / "value.json"
        for n in range(10**9):
            write_json(path, {"n": n, "same": [n] * 2000})
            if n == 0:
                print("working", flush=True)
    """
    for _ in kill_at_random_moments(script, tmp_path):
        value = read_json(tmp_path / "value.json")
        assert value["same"] == [value["n"]] * 2000


# --- a folder


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    """Until the body is done the name does not exist; afterwards everything is there."""
    with new_directory(tmp_path / "a" / "out", marker="manifest.json") as building:
        write_text(building / "deep" / "file", "x")
        write_text(building / "manifest.json", "{}")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "deep" / "file").read_text() == "x"
    assert left_behind(tmp_path / "a") == []


def test_an_own_folder_is_replaced_and_a_failed_one_is_not(tmp_path: Path) -> None:
    """The old artifact is untouched by a failure and gone after a success."""
    out = tmp_path / "out"
    for content in ("old", "new"):
        with new_directory(out, marker="m") as building:
            write_text(building / "m", content)
            write_text(building / content, content)
    assert sorted(path.name for path in out.iterdir()) == ["m", "new"]
    with pytest.raises(KeyboardInterrupt), new_directory(out, marker="m") as building:
        write_text(building / "m", "broken")
        raise KeyboardInterrupt
    assert (out / "m").read_text() == "new"
    assert left_behind(tmp_path) == []


def test_a_foreign_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """`--out ~` never deletes a home: a folder without our marker, or a file, stays as it is."""
    write_text(tmp_path / "home" / "letter", "dear")
    write_text(tmp_path / "file", "x")
    for name in ("home", "file"):
        with pytest.raises(HavocError, match="choose another --out"), new_directory(tmp_path / name, marker="m"):
            pytest.fail("the body must not run")
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    assert left_behind(tmp_path) == []


def test_a_folder_that_became_foreign_meanwhile_is_kept(tmp_path: Path) -> None:
    """What a person puts at the name while we build is theirs."""
    with (
        pytest.raises(HavocError, match="choose another --out"),
        new_directory(tmp_path / "out", marker="m") as building,
    ):
        write_text(building / "m", "x")
        write_text(tmp_path / "out" / "letter", "dear")
    assert (tmp_path / "out" / "letter").read_text() == "dear"


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    """`mkdir out && havoc export --out out` works."""
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out", marker="m") as building:
        write_text(building / "m", "x")
    assert (tmp_path / "out" / "m").exists()


@pytest.mark.parametrize("out", [".", "../here"])
def test_the_working_directory_may_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """`mkdir here && cd here && havoc export --out .` works."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_directory(Path(out), marker="m") as building:
        write_text(building / "m", "x")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["here", "here/m"]


@pytest.mark.parametrize("has_target", [True, False])
def test_a_link_is_written_through(tmp_path: Path, has_target: bool) -> None:
    """`out -> /large/disk/out` stays a link, what it leads to is written whole, and nothing is left beside either."""
    (tmp_path / "disk").mkdir()
    if has_target:
        (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "out").symlink_to("disk/out")
    with new_directory(tmp_path / "out", marker="m") as building:
        write_text(building / "m", "x")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "m").read_text() == "x"
    assert left_behind(tmp_path) == left_behind(tmp_path / "disk") == []


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    """One line, nothing written."""
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(HavocError), new_directory(tmp_path / "out", marker="m"):
        pytest.fail("the body must not run")
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_two_writers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    """The second is refused while the first still writes, and the first is not disturbed."""
    out = tmp_path / "[out]"
    with new_directory(out, marker="m") as building:
        with pytest.raises(HavocError, match="another process"), new_directory(out, marker="m"):
            pytest.fail("the body must not run")
        write_text(building / "m", "first")
    assert (out / "m").read_text() == "first"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_folder_of_many_files_has_one_writer(tmp_path: Path) -> None:
    """A second run into the same folder is refused while the first works, not afterwards; nothing of the lock stays."""
    out = tmp_path / "new" / "run"
    with storage.only_writer(out):
        script = """
            import sys
            from pathlib import Path
            from havoc_core.errors import HavocError
            from havoc_core.storage import only_writer
            try:
                with only_writer(Path(sys.argv[1])):
                    print("in")
            except HavocError as error:
                print(error)
        """
        refusal = f"{out} is being written by another process; wait until it ends\n"
        assert run_child(script, out).communicate(timeout=60)[0] == refusal
        write_text(out / "file", "x")
    assert run_child(script, out).communicate(timeout=60)[0] == "in\n"
    assert [path.name for path in out.iterdir()] == ["file"]
    with pytest.raises(KeyboardInterrupt), storage.only_writer(tmp_path / "nothing"):
        raise KeyboardInterrupt
    assert not (tmp_path / "nothing").exists()


def test_without_an_exchange_the_swap_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without renameat2 the old folder is moved aside, and put back when the second step fails."""
    monkeypatch.setattr(storage, "_exchange", lambda _first, _second: False)
    for content in ("old", "new"):
        with new_directory(tmp_path / "out", marker="m") as building:
            write_text(building / "m", content)
    assert (tmp_path / "out" / "m").read_text() == "new"
    assert left_behind(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        storage._put_in_place(tmp_path / "missing", tmp_path / "out")
    assert (tmp_path / "out" / "m").read_text() == "new"


def test_kill_9_never_tears_a_folder(tmp_path: Path) -> None:
    """Killed at any moment, the folder is one whole generation, and the next run removes what was left."""
    script = """
        import sys
        from pathlib import Path
        from havoc_core.storage import new_directory, write_text
        for n in range(10**9):
            with new_directory(Path(sys.argv[1]) / "out", marker="m") as building:
                for name in ("m", "a", "b"):
                    write_text(building / name, str(n))
            if n == 1:
                print("working", flush=True)
    """
    for _ in kill_at_random_moments(script, tmp_path):
        assert len({(tmp_path / "out" / name).read_text() for name in ("m", "a", "b")}) == 1
    with new_directory(tmp_path / "out", marker="m") as building:
        write_text(building / "m", "last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- the journal


def test_the_journal_remembers(tmp_path: Path) -> None:
    """Entries come back in order, in this process and the next."""
    journal = Journal(tmp_path / "new" / "journal.jsonl")
    entries = [{"n": n, "text": "line\nbreak ☃"} for n in range(5)]
    for entry in entries:
        journal.append(entry)
    assert journal.entries == entries
    assert Journal(journal.path).entries == entries


def test_the_journal_survives_truncation_at_every_byte(tmp_path: Path) -> None:
    """Cut anywhere, it opens with every entry that was still whole, and takes new ones."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    ends = []
    for n in range(4):
        journal.append({"n": n})
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        cut = Journal(path)
        assert [entry["n"] for entry in cut.entries] == list(range(sum(end <= length for end in ends)))
        cut.append({"n": "after"})
        assert Journal(path).entries == cut.entries


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """A changed entry is never returned as if it were the one that was written."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for n in range(3):
        journal.append({"n": n})
    data = path.read_bytes()
    first_lines = data.rindex(b"\n", 0, -1) + 1
    for position in range(len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        if position < first_lines - 1:
            with pytest.raises(HavocError, match=r"line \d is damaged"):
                Journal(path)
        else:
            assert Journal(path).entries in ([{"n": 0}, {"n": 1}], [{"n": 0}])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_journal_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever the file holds, opening it ends in entries or in a `HavocError`."""
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    path.write_bytes(data)
    try:
        assert Journal(path).entries == []
    except HavocError as error:
        assert "damaged" in str(error)


def test_kill_9_never_loses_a_committed_entry(tmp_path: Path) -> None:
    """An entry whose append returned is there after the kill; at most one more line follows."""
    script = """
        import sys
        from pathlib import Path
        from havoc_core.storage import Journal
        folder = Path(sys.argv[1])
        journal = Journal(folder / "journal.jsonl")
        acknowledged = open(folder / "acknowledged", "w", buffering=1)
        for n in range(len(journal.entries), 10**9):
            journal.append({"n": n, "text": "x" * 500})
            acknowledged.write(f"{n}\\n")
            if acknowledged.tell() < 10:
                print("working", flush=True)
    """
    num_before = 0
    for _ in kill_at_random_moments(script, tmp_path):
        numbers = [entry["n"] for entry in Journal(tmp_path / "journal.jsonl").entries]
        acknowledged = int((tmp_path / "acknowledged").read_text().split()[-1])
        assert numbers == list(range(len(numbers)))
        assert len(numbers) - 2 <= acknowledged < len(numbers)
        assert len(numbers) > num_before
        num_before = len(numbers)


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that can be made passes and is not made; a file in its way, or rights that are missing, are named."""
    storage.require_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HavocError, match="file: a file, not a folder"):
        storage.require_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(HavocError, match="no permission to write"):
        storage.require_writable(tmp_path / "new")
