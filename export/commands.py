"""What `havoc export`, `verify`, `import` and `generate` do once their arguments are parsed."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from ..errors import HavocError, IdentityError, printable
from ..model.config_file import read_config
from ..model.structure import Structure
from ..progress import SILENT, make_progress
from ..storage import read_bounded, require_writable
from .card import cost_sentence
from .runtime.artifact import MANIFEST, SIGNATURE, ArtifactManifest, read_manifest
from .runtime.dialects import DEFAULT_DIALECT, choose_dialect
from .runtime.live_table import EXPERTS_FILE, refuse_alpha
from .runtime.options import DEFAULT_OPTIONS, GraphOptions, options_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from ..adapt.alpha_search import Alpha, CrossEntropySettings
    from ..adapt.basis import Basis
    from ..adapt.expert import Expert
    from ..adapt.mixtures import Mixtures
    from ..adapt.tasks.task import Prompt, Task
    from ..model.config import HavocConfig
    from .runtime.signature import Signer
    from .runtime.verification import Checked
    from .source import Source

_MAX_IMAGE_BYTES = 1 << 24
_IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
_EXACT = (
    "note: products compute in fp32, because rounding activations to int8 would cost more than the default targets "
    "allow a format; --compute int8 keeps the faster ones"
)
_BEYOND = (
    "warning: --context is longer than the base's own context; beyond that, positions are extrapolated (RoPE), and the "
    "text gets worse"
)
_UNCUT = "warning     --rank changed nothing: two factors of that rank are larger than every matrix they would replace"


def handle_export(args: argparse.Namespace) -> int:
    """Fold and write an artifact, with `--to hf` a Hugging Face directory, with `--to pt` files of torch."""
    from .source import open_source

    also_on = _also_on(args)
    signer = _signer(args.sign)
    structure = _structure(args)
    source = open_source(args.base)
    options = _graph_options(args, source.config.attention.head_dim)
    if args.to != "pt" and source.directory is not None and source.tokenizer is None:
        from ..model.base_tokenizer import missing_tokenizer

        print(f"note: {printable(missing_tokenizer(source.directory))}; nor will the artifact", file=sys.stderr)
    experts, alpha = _experts(args.experts, args.alpha, source, is_live=args.live)
    if not args.replace:
        weights = dict(zip((expert.hash for expert in experts), alpha, strict=True))
        _require_same_making(args.out, source, weights, structure, is_live=args.live)
    progress = make_progress(quiet=args.quiet)
    folded: dict[str, Any] = {
        "experts": experts,
        "alpha": alpha,
        "rule": args.rule,
        "weight_format": args.weights,
        "progress": progress,
    }
    if args.to == "hf":
        from .huggingface import export_huggingface

        out = export_huggingface(source, args.out, signer=signer, **folded)
        _print(args.json, {"directory": str(out), "format": "hf"}, [f"Hugging Face directory: {out}"])
        return 0
    if args.to == "pt":
        from .torch_files import MODEL, expert_file, export_torch

        out = export_torch(source, args.out, **folded)
        names = [MODEL, *(expert_file(expert.domain) for expert in experts)]
        _print(args.json, {"directory": str(out), "format": "pt", "files": names}, [str(out / name) for name in names])
        return 0
    from .package import export_artifact

    out = export_artifact(
        source,
        args.out,
        experts=experts,
        alpha=alpha,
        rule=args.rule,
        structure=structure,
        options=options,
        signer=signer,
        calibration=args.calibration,
        is_compute_open=args.compute == "auto",
        is_live=args.live,
        also_on=also_on,
        progress=progress,
    )
    manifest = read_manifest(out)
    if Structure.from_fields(manifest.structure) != structure:
        print(_EXACT, file=sys.stderr)
    _print(
        args.json, {"directory": str(out), "format": "onnx", "manifest": manifest.to_json()}, _summary(out, manifest)
    )
    return 0


def _also_on(args: argparse.Namespace) -> dict[str, str]:
    """The provider and the name of the card on which the graph is also proven; empty if none was asked for.

    A card on which ONNX Runtime cannot compute is an `IdentityError`.
    """
    from ..bench.device import identify_device
    from ..bench.doctor import provider_problem
    from .runtime.devices import DEVICE_KINDS

    if args.proven_on is None:
        return {}
    if args.to != "onnx":
        raise HavocError(
            f"--device checks a graph on that device, but --to {args.to} writes no graph: leave one of them out"
        )
    kind = DEVICE_KINDS[args.proven_on]
    if kind.is_host:
        return {}
    try:
        name = identify_device(kind.provider).name
    except HavocError as error:
        raise IdentityError(f"device {kind.name}: {error}") from error
    if (problem := provider_problem(kind.provider)) is not None:
        raise IdentityError(f"device {kind.name}: {problem}")
    return {kind.provider: name}


def _require_same_making(
    out: Path, source: Source, weights: dict[str, float], structure: Structure, *, is_live: bool
) -> None:
    """Refuse to replace an artifact that this command would not have written: it may be the result of a long search."""
    try:
        there = read_manifest(out)
    except HavocError:  # no artifact or a damaged one: a new export repairs it
        return
    mixed = {there.expert_hashes[domain]: weight for domain, weight in there.alpha.items()}
    fields = {name: str(value) for name, value in structure.to_fields().items()}
    for what, is_same in (
        ("base", there.base_hash == source.hash),
        ("mixture", mixed == weights),
        ("structure", there.structure == fields),
        ("kind (live or not)", (there.live is not None) == is_live),
    ):
        if not is_same:
            raise HavocError(f"{out} holds an artifact of another {what}: choose another --out, or give --replace")


def _structure(args: argparse.Namespace) -> Structure:
    """The requested structure; one that is impossible, also with `--to hf`, is refused before a base is opened."""
    quantizer = args.quantizer.replace("-", "_")
    structure = Structure(
        args.weights,
        args.activations,
        args.block_size,
        not args.asymmetric,
        quantizer,
        args.rank,
        args.compute,
        args.bits,
    )
    if args.to != "onnx" and args.calibration is not None:
        raise HavocError(
            f"--calibration {args.calibration}: --to {args.to} stores weights as they are; leave the option out"
        )
    if args.to != "onnx" and args.live:
        raise HavocError(
            f"--live keeps experts in an artifact, but --to {args.to} writes no artifact: leave one of them out"
        )
    if args.to != "onnx" and structure not in (Structure(), Structure("fp16")):
        raise HavocError(f"--to {args.to} stores whole fp32 or fp16 weights, not {structure.description}")
    if args.to == "pt" and args.sign is not None:
        raise HavocError("--to pt writes no manifest that could be signed: leave --sign out, or choose --to hf")
    return structure


def _graph_options(args: argparse.Namespace, head_dim: int) -> GraphOptions:
    dialect = choose_dialect(
        args.dialect or (DEFAULT_DIALECT if args.device is None else "auto"),
        device=args.device or "cpu",
        activation_dtype=args.activations,
        head_dim=head_dim,
        cache=args.cache,
    )
    options = GraphOptions(dialect=dialect, cache=args.cache, logits=args.logits, cache_len=args.cache_len)
    if args.to != "onnx" and options != DEFAULT_OPTIONS:
        raise HavocError(
            f"--to {args.to} writes weights and no graph: --dialect, --cache and --logits have nothing to change"
        )
    return options


def _signer(private_key: Path | None) -> Signer | None:
    """Read the key before anything is done that a wrong one would waste."""
    if private_key is None:
        return None
    from .runtime.signature import load_signer

    return load_signer(private_key)


def _experts(
    directory: Path | None, alpha: Sequence[float] | None, source: Source, *, is_live: bool = False
) -> tuple[list[Expert], tuple[float, ...]]:
    """The experts of a folder, each with its weight: the four domains first, then by name.

    A live artifact needs no weights: it is the base until one is chosen.
    """
    if directory is None and alpha is None:
        return [], ()
    if directory is None or (alpha is None and not is_live):
        missing = "--experts DIR" if directory is None else "--alpha"
        raise HavocError(f"a mixture needs both --experts and --alpha: {missing} is missing")
    from ..adapt.expert import experts_in, load_experts

    if not directory.is_dir():
        raise HavocError(f"--experts {directory}: no such directory")
    found = experts_in(directory)
    if alpha is None:
        return load_experts(directory, found, base_hash=source.hash), (0.0,) * len(found)
    if len(found) != len(alpha):
        held = ", ".join(found) or "none"
        raise HavocError(
            f"--alpha needs one weight for each expert: {len(alpha)} given, {directory} holds {len(found)} ({held})"
        )
    return load_experts(directory, found, base_hash=source.hash), tuple(alpha)


def _summary(out: Path, manifest: ArtifactManifest) -> list[str]:
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    mixture = ", ".join(f"{printable(domain)} {weight:g}" for domain, weight in manifest.alpha.items())
    structure = Structure.from_fields(manifest.structure)
    factored = f", {manifest.graph['factored']} as two factors" if "factored" in manifest.graph else ""
    cases = manifest.parity["cases"]
    worst = max(case["ratio"] for case in cases)
    kind = " (random weights)" if manifest.has_random_weights else ""
    return [
        f"artifact    {out}",
        f"base        {printable(manifest.base_name)}{kind}, {manifest.base_hash[:16]}",
        f"mixture     {f'{mixture} (rule {printable(manifest.rule)})' if mixture else 'none: the base itself'}",
        f"structure   {structure.description}{factored}",
        *_live(manifest),
        *_calibrated(manifest),
        f"graph       {options_of(manifest).description}, opset {manifest.graph['opset']}",
        f"size        {manifest.num_parameters:,} parameters, {num_bytes:,} bytes",
        f"parity      at most {worst:.2g} times torch's own error over {len(cases)} ways of running it",
        f"format      {cost_sentence(manifest.format_cost or {})}",
        *(["signed      " + SIGNATURE] if (out / SIGNATURE).exists() else []),
        *([_UNCUT] if str(manifest.graph.get("factored")).startswith("0 of ") else []),
    ]


def _live(manifest: ArtifactManifest) -> list[str]:
    if manifest.live is None:
        return []
    num_bytes = manifest.files[EXPERTS_FILE].num_bytes
    folds = f"{len(manifest.live.matrices)} matrices of each expert in {EXPERTS_FILE}, {num_bytes:,} bytes"
    return [f"live        {folds}; choose a mixture with --alpha NAME=W,..."]


def _calibrated(manifest: ArtifactManifest) -> list[str]:
    said = manifest.calibration
    if said is None:
        return []
    int8 = f", {len(said['int8'])} matrices in int8" if "int8" in said else ""
    text = f"{said['num_tokens']:,} tokens of {'the ' if said['text'] != 'random ids' else ''}{printable(said['text'])}"
    return [f"calibrated  on {text}: {said['bits_per_weight']:.3g} bits a weight{int8}"]


def handle_verify(args: argparse.Namespace) -> int:
    """Hash, open and run an artifact, check its signature; with its base at hand fold it again and compare."""
    from .rebuilt import why_not_rebuilt
    from .runtime.verification import Verified, save_verified
    from .verify import verify_artifact

    base = _base_of(args)
    if args.out is not None:
        require_writable(args.out.parent)
    manifest, checks = verify_artifact(args.artifact, public_key=args.public_key, record=args.record)
    notes = []
    if args.public_key is None and (args.artifact / SIGNATURE).exists():
        notes.append("signed, but by whom was not checked: give --public-key PEM")
    if base is not None:
        from .rederive import rederive

        progress = make_progress(quiet=args.quiet)
        checks += rederive(
            args.artifact,
            manifest,
            base,
            experts_directory=args.experts,
            calibration=args.calibration,
            progress=progress,
        )
    elif _has_torch():
        notes.append(
            f"not folded again: give --base DIR (it is {printable(manifest.base_name)}, {manifest.base_hash[:16]})"
        )
    else:
        notes.append("not folded again: this installation has no torch")
    if args.out is not None:
        is_rebuilt = base is not None or why_not_rebuilt() is None
        save_verified(args.out, Verified(manifest.sha256, is_folded=base is not None, is_rebuilt=is_rebuilt), checks)
    document = {"directory": str(args.artifact), "checks": [vars(check) for check in checks], "notes": notes}
    _print(args.json, document, [*map(_line, checks), *(f"note         {note}" for note in notes), "verified"])
    return 0


def _base_of(args: argparse.Namespace) -> str | None:
    """The base to fold again from: the one given, or one that HAVOC itself holds; what cannot be used is refused."""
    manifest = read_manifest(args.artifact)
    base: str | None = args.base
    if base is not None and not _has_torch():
        raise HavocError('folding again needs torch: pip install "havoc-core[lab]"')
    if base is None and _has_torch():
        base = _own_base(args.artifact, manifest)
    if args.calibration is not None and base is None:
        raise HavocError(f"--calibration {args.calibration}: quantizing again needs the base too: give --base DIR")
    if args.experts is None:
        return base
    if not manifest.alpha:
        raise HavocError(f"--experts {args.experts}: the artifact was made without experts; leave the option out")
    if not args.experts.is_dir():
        raise HavocError(f"--experts {args.experts}: no such directory")
    if base is None:
        raise HavocError(f"--experts {args.experts}: folding again needs the base too: give --base DIR")
    return base


def _own_base(directory: Path, manifest: ArtifactManifest) -> str | None:
    """The preset or bundled base it was made from, by its hash where random weights are denied; names prove nothing."""
    from ..model.config import PRESETS
    from ..model.cost import num_parameters
    from .source import open_source

    name = manifest.base_name
    if name not in PRESETS:
        return None
    if name != "nano" and manifest.has_random_weights:
        return name
    source = open_source(name)
    is_as_large = num_parameters(source.config) == num_parameters(read_config(directory))
    return name if is_as_large and source.hash == manifest.base_hash else None


def _line(check: Checked) -> str:
    return f"{check.name:12s} {printable(check.finding)}"


def _has_torch() -> bool:
    from importlib.util import find_spec

    return find_spec("torch") is not None


def handle_import(args: argparse.Namespace) -> int:
    """Check a base completely and describe it; with `--out` write a GGUF file as a Hugging Face directory."""
    from ..model.config import PRESETS
    from ..model.config_file import is_gguf
    from .inspection import inspect_directory

    if str(args.directory) in PRESETS and not args.directory.exists():
        raise HavocError(
            f"{args.directory} is a preset, and import checks a Hugging Face directory: give the folder of one"
        )
    if args.out is not None and not is_gguf(args.directory):
        raise HavocError(
            f"--out {args.out}: {args.directory} is not a .gguf file, and import writes a directory from one only"
        )
    progress = make_progress(quiet=args.quiet)
    document = inspect_directory(args.directory, progress=progress)
    if args.out is not None:
        from .huggingface import export_huggingface

        document["written_to"] = str(export_huggingface(args.directory, args.out, progress=progress))
    width = max(map(len, document))
    _print(
        args.json, document, [f"{name.replace('_', ' '):{width}s}  {_shown(value)}" for name, value in document.items()]
    )
    return 0


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def handle_generate(args: argparse.Namespace) -> int:
    """Continue one prompt with an artifact (ONNX Runtime) or a base (torch)."""
    from pathlib import Path

    from ..adapt.dispatch_options import refuse_stray_options
    from ..adapt.tasks.task import Prompt

    text = _prompt(args.prompt)
    prompt = Prompt(text, None if args.image is None else _image(args.image))
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed or 0,
    }
    if args.dispatch is not None or args.experts is not None:
        return _generate_dispatched(args, prompt, settings)
    refuse_stray_options(args, {"task": "--task", "data": "--data", "online": "--online"})
    if (Path(args.model) / MANIFEST).exists():
        from .runtime.foreign import foreign_completions

        if args.context is not None:
            raise HavocError(
                f"--context {args.context}: the graph of an artifact ends where its own context ends; give the base "
                "that it was made from"
            )
        runtime, directory = "onnxruntime", Path(args.model)
        num_bytes = sum(file.num_bytes for file in read_manifest(directory).files.values())
        _require_fit(args.image, prompt.image_png, read_config(directory), args.max_new_tokens)
        (completion,) = foreign_completions(
            directory, [prompt], num_bytes=num_bytes, is_chat=args.is_chat, alpha=args.alpha, **settings
        )
    else:
        refuse_alpha(args.alpha, args.model)
        from ..model.checkpoint import load_base
        from ..model.generation import generate_text

        runtime, base = "torch", load_base(args.model, is_chat=args.is_chat, context=args.context)
        if args.context is not None:
            print(_BEYOND, file=sys.stderr)
        _require_fit(args.image, prompt.image_png, base.config, args.max_new_tokens)
        (completion,) = generate_text(base.model, base.tokenizer, [prompt], **settings)
    _print(args.json, {"prompt": text, "completion": completion, "runtime": runtime}, [completion])
    return 0


def _generate_dispatched(args: argparse.Namespace, prompt: Prompt, settings: dict[str, Any]) -> int:
    """Continue a prompt in two passes: choose the expert or the mixture, say which on stderr, and answer with it."""
    from ..adapt.dispatch import open_mixtures
    from ..adapt.dispatch_options import few_shot_search, require_experts_to_choose
    from ..adapt.tasks.task import load_task
    from ..model.checkpoint import load_base
    from ..model.generation import generate_text
    from .runtime.artifact import refuse_artifact

    if args.dispatch is None:
        raise HavocError(
            f"--experts {args.experts}: say how to choose an expert: --dispatch prompt, classifier or few-shot"
        )
    require_experts_to_choose(args)
    is_few_shot = args.dispatch == "few-shot"
    if is_few_shot != (args.task is not None):
        of_prompt = "reads the prompt, so --task has no effect: leave --task out"
        what = "needs --task NAME, the task of its solved rows" if is_few_shot else of_prompt
        raise HavocError(f"--dispatch {args.dispatch} {what}")
    refuse_artifact(args.model)
    search = few_shot_search(
        seed=settings["seed"],
        population=args.population,
        elite_share=args.elite_share,
        generations=args.generations,
        alpha_bounds=args.alpha_bounds,
    )
    task = load_task(args.task, data_dir=args.data, online=args.online) if is_few_shot else None
    base = load_base(args.model, is_chat=args.is_chat)
    _require_fit(args.image, prompt.image_png, base.config, args.max_new_tokens)
    mixtures, basis = open_mixtures(base, args.experts, SILENT)
    with mixtures:
        started = time.perf_counter()
        alpha = _chosen_alpha(args, mixtures, basis, prompt, task, search)
        chosen = time.perf_counter()
        mixtures.scorer(alpha)
        (completion,) = generate_text(base.model, base.tokenizer, [prompt], **settings)
        seconds = {"first_pass_ms": 1000 * (chosen - started), "second_pass_ms": 1000 * (time.perf_counter() - chosen)}
    weights = dict(zip(mixtures.names, alpha, strict=True))
    said = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) or "the base itself"
    print(f"note: {args.dispatch} chose {printable(said)}", file=sys.stderr)
    document = {"prompt": prompt.text, "completion": completion, "runtime": "torch"}
    _print(args.json, {**document, "dispatch": args.dispatch, "alpha": weights, **seconds}, [completion])
    return 0


def _chosen_alpha(
    args: argparse.Namespace,
    mixtures: Mixtures,
    basis: Basis,
    prompt: Prompt,
    task: Task | None,
    search: CrossEntropySettings,
) -> Alpha:
    """The first pass over one prompt; few-shot reads solved rows of `task` instead of the prompt."""
    from ..adapt.dispatch import open_chooser
    from ..adapt.few_shot import NUM_EXAMPLES, find_alpha, solved_examples

    if task is None:
        (place,) = open_chooser(args.dispatch, mixtures, args.experts, basis).places([prompt])
        return mixtures.only(place)
    examples = solved_examples(
        task,
        args.examples or NUM_EXAMPLES,
        path=args.examples_from,
        seed=search.seed,
        data_dir=args.data,
        online=args.online,
    )
    return find_alpha(mixtures, task, examples, settings=search).alpha


def _prompt(argument: str) -> str:
    """The text itself, or stdin for `-`; bytes that are not UTF-8 arrive from the shell as surrogates."""
    try:
        text = sys.stdin.read() if argument == "-" else argument
        text.encode()
    except UnicodeError as error:
        raise HavocError("--prompt: the text is not UTF-8") from error
    return text


def _image(path: Path) -> bytes:
    """PNG bytes of a picture as people store it: upright, 8-bit RGB, the same that a task's rows go through."""
    from ..model.picture import open_picture, png_of
    from ..model.vision import MAX_IMAGE_PIXELS

    try:
        data = read_bounded(path, max_bytes=_MAX_IMAGE_BYTES)
    except OSError as error:
        raise HavocError(f"{path}: {error.strerror or error}") from error
    try:
        return png_of(open_picture(data, formats=_IMAGE_FORMATS, max_pixels=MAX_IMAGE_PIXELS))
    except HavocError as error:
        raise HavocError(f"{path}: {error}") from error


def _require_fit(path: Path | None, png: bytes | None, config: HavocConfig, max_new_tokens: int) -> None:
    """Refuse by its name a picture that is damaged, or that fills the context; say what would fit."""
    if path is None or png is None or config.vision is None:
        return
    from ..model.vision import patchify

    try:
        num_tokens = len(patchify(png, config.vision))
    except HavocError as error:
        raise HavocError(f"{path}: {str(error).removeprefix('image: ')}") from error
    room = config.max_seq_len - max_new_tokens
    side = math.isqrt(max(room - 1, 0)) * config.vision.patch_size
    if num_tokens >= room:
        raise HavocError(
            f"{path}: the picture takes {num_tokens} tokens, and {max_new_tokens} new ones leave {max(room, 0)} of the "
            f"model's {config.max_seq_len}: up to {side} x {side} pixels fit, less what the prompt takes"
        )


def _print(as_json: bool, document: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))
