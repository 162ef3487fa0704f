"""The command `havoc`: parse first, import last.

`VERBS` is the whole surface. A verb's handler, `handle_<verb>(args) -> exit code`, lives in the room that does the work
and is imported only once the arguments are known to be right, so `havoc --help` and every typo answer at once, without
torch or numpy. Results go to stdout, progress and errors to stderr. Exit codes are those of `errors.py`, and

    70  a defect in HAVOC itself    141  the reader of stdout went away
    129 hung up    130  interrupted    143  terminated
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import select
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__, arguments
from .arguments import Parser, did_you_mean
from .children import NO_MORE
from .cores import let_threads_sleep
from .errors import HavocError
from .storage import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

EXIT_DEFECT, EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 70, 129, 130, 141, 143

_LINE_CHARS = 1500  # of a message; a hostile file may put anything into one

_EXTRA_OF = {
    **dict.fromkeys(("numpy", "onnxruntime", "pynvml", "PIL", "tokenizers"), "edge"),
    **dict.fromkeys(("torch", "safetensors", "onnx", "onnx_ir", "onnxscript", "pymoo", "datasets", "gguf"), "lab"),
    "matplotlib": "report",
    **dict.fromkeys(("dask", "distributed"), "cluster"),
    "wandb": "wandb",
    "trackio": "trackio",
}
"""The extra that brings a package which a verb may lack."""
_GOES_ON = frozenset(
    {"run", "search", "train", "pretrain", "baselines"}
)  # the verbs that keep what was done when interrupted


@dataclass(frozen=True)
class Verb:
    """One verb of the command line: its name, its description, its module and its arguments."""

    name: str
    help: str
    module: str
    add_arguments: Callable[[Parser], None]
    examples: tuple[str, ...]

    @property
    def handler(self) -> str:
        """Name of the function in `module` that carries the verb out."""
        return f"handle_{self.name}"


VERBS = (
    Verb(
        "run",
        "the whole story: experts, search, artifact, measurement, verdict, report",
        "commands",
        arguments.add_run,
        (
            "havoc run --out demo",
            "havoc run recipe.toml --out run1",
            "havoc run --handoff phase6.json --out run1",
            "havoc run recipe.toml --cluster tls://box:8786 --out run1",
        ),
    ),
    Verb(
        "plan",
        "compute what a model can reach on a target, before any run",
        "bench.commands",
        arguments.add_plan,
        ("havoc plan edge-135m --target gtx1660", "havoc plan 7b --target gtx1660 --json"),
    ),
    Verb(
        "pretrain",
        "train a base from scratch",
        "adapt.commands",
        arguments.add_pretrain,
        ("havoc pretrain nano --out base", "havoc pretrain nano --text a.txt b.txt --out base"),
    ),
    Verb(
        "tokenizer",
        "train a tokenizer on text files",
        "adapt.commands",
        arguments.add_tokenizer,
        ("havoc tokenizer train a.txt b.txt --vocab-size 512 --out tokenizer",),
    ),
    Verb(
        "import",
        "check a Hugging Face directory and describe it",
        "export.commands",
        arguments.add_import,
        ("havoc import SmolLM2-135M",),
    ),
    Verb(
        "train",
        "train one expert, or what chooses between them",
        "adapt.commands",
        arguments.add_train,
        (
            "havoc train nano --task math --out experts",
            "havoc train base --task mine.toml --out experts",
            "havoc train nano --classifier math,code,reasoning --out experts",
            "havoc train base --task math --cluster tls://box:8786 --out experts",
        ),
    ),
    Verb(
        "baselines",
        "SVF beside LoRA and others: same rows, budget and seeds, one report",
        "bench.commands",
        arguments.add_baselines,
        (
            "havoc baselines nano --task math --out baselines",
            "havoc baselines base --task mine.toml --arms svf-reward,lora-next-token --seeds 0 --out baselines",
        ),
    ),
    Verb(
        "search",
        "find the mixture of experts and the structure",
        "commands",
        arguments.add_search,
        (
            "havoc search nano --experts experts --target host --out search",
            "havoc search base --experts experts --target gtx1660 --cluster tls://box:8786 --out search",
        ),
    ),
    Verb(
        "worker",
        "lend this machine to commands with --cluster: to train, to score, and to measure on its device",
        "cluster.commands",
        arguments.add_worker,
        ("havoc worker tcp://127.0.0.1:8786", "havoc worker tcp://127.0.0.1:8786 --measures"),
    ),
    Verb(
        "watch",
        "show the status of a run or a search, from another terminal",
        "watching",
        arguments.add_watch,
        ("havoc watch demo", "havoc watch search --once --json"),
    ),
    Verb(
        "export",
        "fold the experts into the base and write the artifact",
        "export.commands",
        arguments.add_export,
        (
            "havoc export nano --out artifact",
            "havoc export nano --experts experts --alpha 1.2,0.8,1.5,0.9 --weights int8 --out artifact",
        ),
    ),
    Verb(
        "verify",
        "hash an artifact again, fold it again, run it again",
        "export.commands",
        arguments.add_verify,
        ("havoc verify artifact", "havoc verify artifact --base nano --experts experts"),
    ),
    Verb(
        "eval",
        "accuracy by task, with intervals",
        "bench.commands",
        arguments.add_eval,
        (
            "havoc eval artifact",
            "havoc eval nano --task math --n 200",
            "havoc eval base --task mine.toml",
            "havoc eval nano --experts experts --dispatch prompt,classifier,few-shot --n 200",
        ),
    ),
    Verb(
        "bench",
        "measure an artifact on this machine",
        "bench.commands",
        arguments.add_bench,
        (
            "havoc bench artifact --out reports/run1",
            "havoc bench artifact --profile release --out reports/run2",
            "havoc bench model.gguf --out reports/llama",
            "havoc bench artifact model.gguf --engine all --out reports/engines",
        ),
    ),
    Verb(
        "gate",
        "judge records against a target; the exit code is the verdict",
        "bench.commands",
        arguments.add_gate,
        (
            "havoc gate demo/record.json --target host",
            "havoc gate a.json b.json --target own.toml --artifact artifact",
        ),
    ),
    Verb(
        "compare",
        "two records: ratio and interval",
        "bench.commands",
        arguments.add_compare,
        ("havoc compare old/record.json new/record.json",),
    ),
    Verb(
        "duel",
        "measure two artifacts in turns until slower, equal or faster is proven",
        "bench.commands",
        arguments.add_duel,
        (
            "havoc duel released candidate",
            "havoc duel released candidate --margin 0.02 --max-time 600",
            "havoc duel model.gguf artifact",
        ),
    ),
    Verb(
        "history",
        "all records of a folder in order of time: lasting changes of a figure",
        "bench.commands",
        arguments.add_history,
        ("havoc history reports", "havoc history reports --target host --fail-if alarm"),
    ),
    Verb(
        "report",
        "write html, markdown, junit and badge of a measured folder",
        "bench.commands",
        arguments.add_report,
        ("havoc report demo", "havoc report reports/run1 --target host --target gtx1660"),
    ),
    Verb(
        "generate",
        "continue a prompt",
        "export.commands",
        arguments.add_generate,
        (
            (
                r"havoc generate nano --prompt $'Question: Dan has 53 apples and buys 2 bags with 9 apples in each. "
                r"What is the number of apples Dan has now?\nAnswer:\n'"
            ),
            "havoc generate nano --experts experts --dispatch classifier --prompt 'Question: what is 2 + 3?'",
        ),
    ),
    Verb(
        "doctor",
        "show what this machine can and cannot measure",
        "bench.commands",
        arguments.add_doctor,
        ("havoc doctor", "havoc doctor --json"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    _open_what_is_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name in another encoding must not end the command
    stops: list[BaseException] = []
    try:
        with _unwound_by_signals(stops), _libraries_kept_from_stdout():
            return _run(words, stops)
    except BaseException as error:  # noqa: BLE001 - every end of a command is explained here
        if "--debug" in words:
            traceback.print_exc()
        return _explain(stops[-1] if stops else error, words[0] if words else "")


def _open_what_is_closed() -> None:
    """Let a command without standard streams (`>&-`) do its work anyway, without output."""
    sys.stdin = sys.stdin or Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - for the whole run
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the whole run
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - the same


@contextlib.contextmanager
def _libraries_kept_from_stdout() -> Iterator[None]:
    """Keep stdout for the command's own output: text that a library writes to descriptor 1 goes to stderr.

    A banner of a runtime would be in the middle of a JSON document. A test that captures stdout keeps it.
    """
    said = sys.stdout
    try:
        is_ours = isinstance(said, io.TextIOWrapper) and said.fileno() == 1
        kept = os.dup(1) if is_ours else -1
    except (OSError, ValueError):
        is_ours = False
    if not is_ours or not isinstance(said, io.TextIOWrapper):
        yield
        return
    said.flush()
    with contextlib.suppress(OSError):  # stderr is closed: they write where they did
        os.dup2(2, 1)
    own = os.fdopen(kept, "w", 1 if said.line_buffering else -1, encoding=said.encoding, errors=said.errors)
    sys.stdout = own
    try:
        yield
    finally:
        sys.stdout = said
        with contextlib.suppress(OSError):  # the reader has gone
            own.flush()
        os.dup2(kept, 1)
        with contextlib.suppress(OSError):
            own.close()


def _run(words: Sequence[str], stops: Sequence[BaseException]) -> int:
    try:
        args = parse(words)
        _require_a_place(args)
        let_threads_sleep()
        handler = _handler(args.verb)
        if stops:
            raise stops[-1]  # swallowed by a module that was being imported
        return handler(args)
    finally:
        sys.stdout.flush()  # here, where a reader that went away can still be told from a failure


def _require_a_place(args: argparse.Namespace) -> None:
    """Refuse names that no file of ours could hold, and a working directory that is gone, before anything is loaded.

    Libraries take names as UTF-8, and end the whole process where they cannot resolve their own. A prompt is no name:
    its verb says what is wrong with it.
    """
    for option, value in vars(args).items():
        for word in value if isinstance(value, list) else [value]:
            try:
                str(word if option != "prompt" else "").encode()
            except UnicodeEncodeError:
                raise HavocError(f"{str(word)!r} is not UTF-8: choose another name, or rename it") from None
    try:
        Path.cwd()
    except FileNotFoundError:
        raise HavocError("the working directory no longer exists: change into another one") from None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one call; a mistake is explained on stderr, with the nearest right word, and exits 2."""
    parser, parsers = make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(HavocError.exit_code)
    if not argv[0].startswith("-"):
        if argv[0] not in parsers:
            parser.error(f"unknown verb {argv[0]!r}{did_you_mean(argv[0], parsers)}")
        parsers[argv[0]].refuse_unknown_options(argv[1:])
    return parser.parse_args(argv)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command, and that of each verb by its name."""
    parser = Parser(
        prog="havoc",
        description="From one base checkpoint to a released edge model, every number measured on its own device.",
        epilog="exit codes: 0 done or passed, 1 a limit is missed, 2 usage, 3 undecided, 4 invalid measurement, "
        "5 wrong device or artifact, 6 nothing was learned",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"havoc {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs", parser_class=Parser)
    parsers: dict[str, Parser] = {}
    for verb in VERBS:
        parsers[verb.name] = subparsers.add_parser(
            verb.name,
            help=verb.help,
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog="\n  ".join(("examples:", *verb.examples)),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        verb.add_arguments(parsers[verb.name])
    return parser, parsers


def _handler(name: str) -> Callable[[argparse.Namespace], int]:
    verb = next(verb for verb in VERBS if verb.name == name)
    module = importlib.import_module(f".{verb.module}", __package__)
    handler: Callable[[argparse.Namespace], int] = getattr(module, verb.handler)
    return handler


@contextlib.contextmanager
def _unwound_by_signals(stops: list[BaseException]) -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so temporary files go away and children are ended.

    What a signal raises is noted in `stops` too: a compiled module may swallow it while it is imported, and fail in its
    own way, or half done. A signal that this process was told to ignore (by nohup, or in the background) stays ignored.
    """

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        stops.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(codes[number]))
        raise stops[-1]

    codes: dict[int, int] = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
    if sys.platform != "win32":
        codes[signal.SIGHUP] = EXIT_HUNG_UP
    before = {}
    try:
        for number in codes:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: BaseException, verb: str = "") -> int:
    """Say in one line what ended the command; return the exit code."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else HavocError.exit_code
        case KeyboardInterrupt():
            goes_on = "the same command starts again" if verb not in _GOES_ON else "run the same command to continue"
            _say(f"interrupted; {goes_on}")
            return EXIT_INTERRUPTED
        case BrokenPipeError() if _stdout_is_gone():
            return EXIT_BROKEN_PIPE
        case HavocError():
            _say(f"error: {error}")
            return error.exit_code
        case ModuleNotFoundError() if extra := _EXTRA_OF.get((error.name or "").partition(".")[0]):
            _say(f'error: this command needs {error.name}: pip install "havoc-core[{extra}]"')
        case _ if _is_short_of_threads(error):
            _say(f"error: {NO_MORE}")
        case OSError():
            _say(f"error: {explained(error, error.filename or 'the system')}")
        case MemoryError():
            _say("error: this machine has too little memory for it")
        case _:
            reason = f"{type(error).__name__}: {error}"
            _say(f"internal error: {reason}; please report it with what the same command says under --debug")
            return EXIT_DEFECT
    return HavocError.exit_code


def _is_short_of_threads(error: BaseException) -> bool:
    """Whether the error is that of Python, or of a library, when no further thread or process may be started."""
    words = str(error)
    return "can't start new thread" in words or f"code: {errno.EAGAIN}, kind: WouldBlock" in words


def _stdout_is_gone() -> bool:
    """Whether the reader of stdout has closed its end; buffered output is then dropped without a message."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        is_gone = any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows, no descriptor under a test
        return False
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
    return is_gone


def _say(text: str) -> None:
    text = " ".join(text.splitlines())
    text = text if len(text) <= _LINE_CHARS else f"{text[:_LINE_CHARS]}..."
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    with contextlib.suppress(OSError):
        print(f"havoc: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
