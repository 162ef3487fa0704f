"""The command line: what people and scripts may rely on."""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from havoc_core import __version__, arguments, cli
from havoc_core.cli import VERBS, Verb, main, parse
from havoc_core.errors import HavocError, IdentityError, MeasurementError

NAMES = (
    "run plan pretrain tokenizer import train baselines search worker watch export verify eval "
    "bench gate compare duel history report generate doctor"
).split()
EXAMPLES = [(verb.name, example) for verb in VERBS for example in verb.examples]


def run_python(script: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# --- what can be said


def test_the_verbs_are_these() -> None:
    """The surface is a promise: a verb is added or removed on purpose only."""
    assert [verb.name for verb in VERBS] == NAMES


@pytest.mark.parametrize("verb", VERBS, ids=NAMES)
def test_every_verb_is_carried_out_somewhere(verb: Verb) -> None:
    """No verb pretends: its handler exists and takes the parsed arguments."""
    handler = getattr(importlib.import_module(f"havoc_core.{verb.module}"), verb.handler)
    assert list(inspect.signature(handler).parameters) == ["args"]


def options_of(verb: Verb) -> set[str]:
    parser = arguments.Parser()
    verb.add_arguments(parser)
    return {action.dest for action in parser._actions} - {"help", "debug"}


@pytest.mark.parametrize("verb", VERBS, ids=NAMES)
def test_no_option_is_ignored(verb: Verb) -> None:
    """What can be said is heard: the module of the handler reads every argument, and reads no other."""
    text = inspect.getsource(importlib.import_module(f"havoc_core.{verb.module}"))
    read = set(re.findall(r"\bargs\.(\w+)", text))
    assert options_of(verb) <= read
    assert read <= set.union(*(options_of(other) for other in VERBS if other.module == verb.module))


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb has help with examples, and says so on stdout with exit code 0."""
    assert main([name, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"examples:\n  havoc {name}" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_the_examples_of_the_help_are_right(name: str, example: str) -> None:
    """What the help shows can be typed."""
    command, *words = shlex.split(example)
    assert command == "havoc"
    assert parse(words).verb == name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """A bug report can name the version."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"havoc {__version__}\n"


def test_help_and_typos_load_nothing_heavy() -> None:
    """The command answers at once: neither torch nor numpy nor a room of the house is imported."""
    for words in (["--help"], ["export", "--help"], ["exprot"], ["gate", "r.json", "--traget", "host"]):
        script = """
            import sys
            from havoc_core.cli import main
            code = main(sys.argv[1:])
            heavy = {"torch", "numpy", "pydantic", "rich", "onnxruntime", "scipy"} & set(sys.modules)
            rooms = [name for name in sys.modules if name.startswith(("havoc_core.model", "havoc_core.bench"))]
            sys.exit(f"loaded {heavy} {rooms}" if heavy or rooms else code)
        """
        result = run_python(script, *words)
        assert "loaded" not in result.stderr
        assert result.returncode == (0 if "--help" in words else 2)


def test_the_choices_are_those_of_the_rooms() -> None:
    """The lists that are spelled out here, so that nothing is imported, stay those of the rooms that own them."""
    from typing import get_args

    from havoc_core import config
    from havoc_core.adapt import mixture
    from havoc_core.bench import engines
    from havoc_core.bench.judge import paired
    from havoc_core.export.runtime import options
    from havoc_core.model.structure import WEIGHT_FORMATS

    assert arguments.WEIGHT_FORMATS == WEIGHT_FORMATS
    assert get_args(config.Rule) == arguments.RULES
    assert set(arguments.RULES) == set(get_args(mixture.MixingRule))
    assert options.CACHES == arguments.CACHES
    assert options.LOGITS == arguments.LOGITS
    assert config.BenchSettings.model_fields["profile"].annotation.__args__ == arguments.PROFILES
    assert tuple(engines.ENGINES) == arguments.ENGINES
    assert tuple(paired.DECIDING) == arguments.DUEL_GROUPS


# --- what is said wrongly


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("trian nano", "unknown verb 'trian'; did you mean train?"),
        ("xyzzy", "unknown verb 'xyzzy'"),
        ("train nano --domian math --out x", "unknown option --domian; did you mean --domain?"),
        ("train nano --domain=math --ot=x", "unknown option --ot; did you mean --out?"),
        ("train nano --domain math", "required: --out"),
        ("train", "required: BASE"),
        ("train nano --dom math --out x", "unknown option --dom"),
        ("eval nano --n 0", "argument --n: '0' is not a whole number of at least 1"),
        ("eval nano --n 1e3", "'1e3' is not a whole number"),
        ("eval nano --n ²", "'²' is not a whole number"),
        ("eval nano --n 99999999999999999999", "is not a whole number"),
        ("train nano --domain math --out x --seed -1", "argument --seed"),
        ("export nano --alpha 1,2,x,4 --out a", "is not a list of numbers like 1.2,0.8,1.5,0.9"),
        ("export nano --alpha nan,1,1,1 --out a", "is not a list of numbers"),
        ("export nano --alpha 1,,1 --out a", "is not a list of numbers"),
        ("generate nano --prompt x --temperature inf", "from 0.001 to 1000"),
        ("compare a.json b.json --margin 5%", "is not a number from 0 to 1"),
        ("compare a.json", "RECORD"),
        ("gate --target host", "required: RECORD"),
        ("doctor again", "unrecognized arguments: again"),
        ("--json doctor", "unrecognized arguments: --json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the wrong word and where help is; stdout stays empty."""
    assert main(shlex.split(words)) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert re.fullmatch(r"havoc[^\n]*: error: [^\n]* \(see 'havoc[^\n]* --help'\)\n", captured.err)
    assert captured.out == ""


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Who types only `havoc` sees what there is, and a script sees that nothing was done."""
    assert main([]) == 2
    assert "the whole story" in capsys.readouterr().err


def test_values_that_look_like_options_can_be_said() -> None:
    """A prompt may begin with dashes, after `=` as everywhere."""
    assert parse(["generate", "nano", "--prompt=--seed"]).prompt == "--seed"


def test_what_is_not_said_is_none() -> None:
    """A default that belongs to a recipe is not written a second time in the command line."""
    args = parse(shlex.split("train nano --domain math --out x"))
    assert (args.seed, args.steps, args.data, args.recipe, args.online) == (None, None, None, None, False)


def test_alpha_is_four_numbers() -> None:
    """The mixture reaches its handler as numbers, in the order given."""
    args = parse(shlex.split("export nano --alpha 1.2,0.8,1.5,-0.9 --out x"))
    assert args.alpha == (1.2, 0.8, 1.5, -0.9)
    assert args.out == Path("x")


# --- how a command ends


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (HavocError("rows is 3"), 2, "error: rows is 3"),
        (MeasurementError("throttled"), 4, "error: throttled"),
        (IdentityError("another card"), 5, "error: another card"),
        (HavocError("two\nlines\x1b[31m of a file name"), 2, r"error: two lines\x1b[31m of a file name"),
        (OSError(errno.ENOSPC, "No space left", "/data/x"), 2, "error: /data/x: the disk is full; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: no permission"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "error: the system: Broken pipe"),
        (MemoryError(), 2, "error: this machine has too little memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 2, 'pip install "havoc-core[lab]"'),
        (ModuleNotFoundError("No module named 'numpi'", name="numpi"), 70, "internal error: ModuleNotFoundError"),
        (KeyError("x"), 70, "internal error: KeyError: 'x'; please report it"),
        (KeyboardInterrupt(), 130, "the same command starts again"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 2, 'pip install "havoc-core[report]"'),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end_is_one_line_and_its_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person reads what to do, a script reads the code, and a defect is never taken for a missed limit."""
    assert cli._explain(error) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("havoc: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("verb", ["run", "search", "train", "pretrain"])
def test_what_keeps_its_work_says_that_it_goes_on(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """These leave journals and checkpoints; every other verb starts anew and says so."""
    assert cli._explain(KeyboardInterrupt(), verb) == 130
    assert capsys.readouterr().err.endswith("same command to continue\n")


ENDING = """
    import sys, types
    from havoc_core import cli
    room = sys.modules["havoc_core.room"] = types.ModuleType("room")
    cli.VERBS = tuple(cli.Verb(v.name, v.help, "room", v.add_arguments, v.examples) for v in cli.VERBS)
    def handle_doctor(args):
    {body}
    room.handle_doctor = handle_doctor
    sys.exit(cli.main(sys.argv[1:]))
"""


def ending(body: str) -> str:
    """A script whose `havoc doctor` does `body`: the way a real process ends, with a handler that misbehaves."""
    return textwrap.dedent(ENDING).format(body=textwrap.indent(textwrap.dedent(body), "    "))


def test_a_defect_shows_its_traceback_when_asked() -> None:
    """One line by default; everything with --debug."""
    script = ending("raise KeyError('x')")
    quiet, loud = run_python(script, "doctor"), run_python(script, "doctor", "--debug")
    assert quiet.stderr.count("\n") == 1
    assert "Traceback" in loud.stderr
    assert quiet.returncode == loud.returncode == 70


def test_a_handler_whose_import_fails_is_a_defect() -> None:
    """Not taken for a missing extra: its name is no package of ours."""
    broken = run_python(ending("import torch_of_another_world"), "doctor")
    assert broken.returncode == 70


@pytest.mark.skipif(sys.platform == "win32", reason="no shell with >&-")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_defect(closed: str) -> None:
    """Started by a daemon without stdout or stderr, a command does its work and its exit code says how it went."""
    command = f"{sys.executable} -m havoc_core"
    for words, code in (("plan nano --target host", 0), ("plan nowhere --target host", 2)):
        assert subprocess.run(f"{command} {words} {closed}", shell=True, capture_output=True).returncode == code


def test_a_line_stays_readable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file that puts a megabyte where a number belongs does not fill the screen."""
    (tmp_path / "config.json").write_text('{"model_type": "' + "x" * 1_000_000 + '"}')
    assert main(["import", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert len(line) < 2000
    assert line.startswith(f"havoc: error: {tmp_path / 'config.json'}: ")
    assert line.endswith("...\n")


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted; the same command starts again"),
        (signal.SIGTERM, 143, ""),
        *([(signal.SIGHUP, 129, "")] if sys.platform != "win32" else []),
    ],
)
def test_a_stopped_command_leaves_nothing_half_written(
    number: signal.Signals, code: int, words: str, tmp_path: Path
) -> None:
    """Ctrl-C and a polite kill both unwind: the folder under construction is removed."""
    script = ending("""
        import time
        from pathlib import Path
        from havoc_core.storage import new_directory, write_text
        with new_directory(Path("out"), marker="m") as building:
            write_text(building / "m", "x")
            print("working", flush=True)
            time.sleep(30)
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, "doctor"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert child.stdout
    assert child.stdout.readline() == "working\n"
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert err.startswith(f"havoc: {words}" if words else "")
    assert err.count("\n") == bool(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("then", ["raise RecursionError('of its own')", "import a_module_half_imported", "pass"])
def test_a_signal_that_a_module_swallows_still_ends_the_command(
    name: str, code: int, then: str, tmp_path: Path
) -> None:
    """A compiled module that is stopped while it is imported fails in its own way; that is no defect of ours."""
    (tmp_path / "swallowing.py").write_text(f"""
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    signal.pause()
except BaseException:
    pass
{then}
""")
    script = ending("import swallowing\nraise RuntimeError('half a module')" if then != "pass" else "print('went on')")
    if then == "pass":  # swallowed without a trace, by what the handler's own module imports
        importing = "cli._handler = lambda _: (__import__('swallowing'), handle_doctor)[1]"
        script = script.replace("sys.exit(cli.main", f"{importing}\nsys.exit(cli.main")
    result = run_python(script, "doctor", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (code, "")
    assert "internal error" not in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_an_ignored_hangup_stays_ignored() -> None:
    """Under nohup a command outlives its terminal."""
    script = ending("import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nprint('went on')\nreturn 0")
    result = run_python(f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{script}", "doctor")
    assert (result.returncode, result.stdout) == (0, "went on\n")


@pytest.mark.parametrize(("words", "unbuffered"), [("doctor", "1"), ("doctor", ""), ("--help", "")])
def test_a_reader_that_goes_away_is_no_error(words: str, unbuffered: str) -> None:
    """`havoc ... | head -1` prints no complaint."""
    script = ending("print('line\\n' * 100_000)")
    child = subprocess.Popen(
        [sys.executable, "-c", script, words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert child.stdout
    child.stdout.close()
    assert child.stderr
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(timeout=30) == 141


def test_a_full_stdout_is_an_error() -> None:
    """A result that could not be written is not exit code 0."""
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is what a full disk looks like, and is not here")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", ending("print('x')"), "doctor"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert result.returncode != 0
    assert "the disk is full" in result.stderr


def test_a_file_name_in_another_encoding_is_printed() -> None:
    """A result that names such a file ends well, whatever the terminal can show."""
    script = ending("print('caf\\udce9 \\u2603')\nreturn 0")
    result = run_python(script, "doctor", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stdout) == (0, "caf\\udce9 \\u2603\n")


@pytest.mark.parametrize("command", [["havoc"], [sys.executable, "-m", "havoc_core"]])
def test_both_names_of_the_command_work(command: list[str]) -> None:
    """The installed script and `python -m havoc_core` are the same program."""
    program = [str(Path(sys.executable).with_name("havoc")) if word == "havoc" else word for word in command]
    result = subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=30)
    assert result.stdout == f"havoc {__version__}\n"


def test_parsers_take_no_abbreviations() -> None:
    """A script written today means the same when an option is added tomorrow."""
    parser, parsers = cli.make_parser()
    assert not any(p.allow_abbrev for p in (parser, *parsers.values()))
    assert isinstance(parser, argparse.ArgumentParser)


@pytest.mark.parametrize("temperature", ["1e-320", "1e308", "-1", "nan"])
def test_temperature_that_leaves_no_distribution(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits divided by it would be infinite or all alike."""
    with pytest.raises(SystemExit, match="2"):
        parse(["generate", "nano", "--prompt", "x", f"--temperature={temperature}"])
    assert "from 0.001 to 1000" in capsys.readouterr().err
