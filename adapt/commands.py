"""Handlers of the verbs that make experts, bases and tokenizers: `havoc train`, `pretrain` and `tokenizer train`."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from ..config import load_recipe
from ..cores import limit_threads, threads_for
from ..errors import HavocError
from ..progress import make_progress
from ..storage import read_bounded, unreadable
from ..track.tracker import require_trackers
from ..tracking import open_tracking, with_trackers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from ..config import Recipe
    from .expert import Expert

_MAX_TEXT_BYTES = 1_000_000_000


def handle_pretrain(args: argparse.Namespace) -> int:
    """Train a base from scratch, on the built-in corpus or on the user's texts, and print its path."""
    from ..model.tokenizer import Tokenizer
    from .pretrain import PretrainSettings, pretrain
    from .pretrain_text import TextSettings, pretrain_text

    given = {"num_steps": args.steps, "seed": args.seed}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    shared: dict[str, Any] = {
        "tokenizer": None if args.tokenizer is None else Tokenizer.load(args.tokenizer),
        "device": args.device or "cpu",
        "progress": make_progress(quiet=args.quiet),
    }
    if args.text:
        texts = _texts_of(args.text)
        out = pretrain_text(args.preset, texts, args.out, settings=TextSettings(**changes), **shared)
    else:
        out = pretrain(args.preset, args.out, settings=PretrainSettings(**changes), **shared)
    print(json.dumps({"base": str(out)}) if args.json else f"base written to {out}")
    return 0


def _texts_of(paths: Sequence[Path]) -> dict[str, str]:
    """The files' texts by their names, which a record lists; two of one name, and no text at all, are refused."""
    names = [path.name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise HavocError(f"two texts have the file name {twice[0]}: rename one, because a record lists them by name")
    texts = {path.name: _text_of(path) for path in paths}
    if not any(texts.values()):
        raise HavocError("the files hold no text: give files with text")
    return texts


def handle_tokenizer(args: argparse.Namespace) -> int:
    """Train a tokenizer on text files and write it; `train` is the only action."""
    from ..model.tokenizer import train_tokenizer
    from .pretrain import sha256_of

    assert args.action == "train"  # noqa: S101 - argparse knows no other
    if (args.out / "tokenizer.json").exists():
        raise HavocError(f"{args.out} holds a tokenizer; remove it or choose another --out")
    texts = [_text_of(path) for path in args.texts]
    if not any(texts):
        raise HavocError("the files hold no text: give files with text")
    with make_progress(quiet=args.quiet).stage("tokenizer", None):
        tokenizer = train_tokenizer((line for text in texts for line in text.splitlines(True)), args.vocab_size)
    tokenizer.save(args.out)
    document = {"tokenizer": str(args.out), "vocab_size": tokenizer.vocab_size, "sha256": sha256_of(tokenizer)}
    fewer = "" if tokenizer.vocab_size == args.vocab_size else f" of {args.vocab_size}: the texts give no more"
    print(json.dumps(document) if args.json else f"tokenizer written to {args.out}: {tokenizer.vocab_size} ids{fewer}")
    return 0


def _text_of(path: Path) -> str:
    """The content of a text file; one that is unreadable or not UTF-8 is a `HavocError` with its name."""
    try:
        return read_bounded(path, max_bytes=_MAX_TEXT_BYTES).decode("utf-8")
    except OSError as error:
        raise unreadable(error, path) from error
    except UnicodeDecodeError as error:
        raise HavocError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def handle_train(args: argparse.Namespace) -> int:
    """Train one expert, or the classifier, and write its file; one that is there is kept unless --force says so."""
    from ..cluster.address import TlsFiles
    from ..commands import opened_fleet
    from ..jobs import Place, training_settings
    from ..model.checkpoint import load_base
    from ..pipeline import train_tasks
    from .basis import base_basis
    from .classifier import classifier_path, classifier_task, train_classifier
    from .expert import expert_path, load_expert, lora_ratio, write_expert
    from .tasks.sight import require_sight
    from .tasks.task import load_tasks
    from .training import train_expert
    from .training_state import forget_training, state_path

    if args.classifier and args.cluster:
        raise HavocError("--classifier: what chooses between experts is trained on this machine: leave out --cluster")
    recipe = with_trackers(load_recipe(args.recipe), args.track)
    require_trackers(recipe.track.to)
    tasks = load_tasks(args.classifier or (args.task,), data_dir=args.data, online=args.online)
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"base": args.base, "chat": args.is_chat, "device": args.device or recipe.model.device}
            ),
            "experts": recipe.experts.model_copy(
                update={"tasks": tuple(task.name for task in tasks), **_changes(args)}
            ),
        }
    )
    task = classifier_task() if args.classifier else tasks[0]
    settings = training_settings(recipe.experts, task)
    path = classifier_path(args.out) if args.classifier else expert_path(args.out, task.name)
    if path.exists() and not args.force:
        raise HavocError(f"{path} is a finished expert: use --force to train it again, or choose another --out")
    progress = make_progress(quiet=args.quiet)
    with contextlib.ExitStack() as opened:
        tls = TlsFiles(authority=args.tls_ca, certificate=args.tls_cert, key=args.tls_key)
        fleet = opened.enter_context(opened_fleet(args.cluster, tls, recipe, progress))
        base = load_base(args.base, is_chat=args.is_chat, device=recipe.model.device)
        _ = base.tokenizer  # a base that cannot read text is refused before the minutes that a basis takes
        require_sight(task, base)
        limit_threads(threads_for(base.model.num_parameters(), num_threads=args.threads))
        basis = base_basis(base, args.out, progress)
        tracking = opened.enter_context(open_tracking(recipe, args.out, job="train"))
        if not state_path(args.out, task.name).exists():
            tracking.forget(f"svf/{task.name}/")  # the expert is trained again
        shared: dict[str, Any] = {
            "settings": settings,
            "checkpoint_dir": args.out,
            "data_dir": args.data,
            "online": args.online,
            "progress": progress,
            "record": tracking.log,
        }
        if fleet is not None:
            place = Place(_with_inputs(recipe, args), args.out, args.out, args.threads)
            train_tasks(place, base, {args.task: task}, progress, follow=tracking.follow, fleet=fleet)
            expert = load_expert(path, basis=basis)
        else:
            if args.classifier:
                expert = train_classifier(base, basis, tasks, **shared)
            else:
                expert = train_expert(base, basis, task, **shared)
            write_expert(expert, path)
            forget_training(args.out, task.name)
    show_expert(expert, path, lora_ratio(expert, base.model.named_tensors()), as_json=args.json)
    return 0


def _with_inputs(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with the task and the data of the command line, by which their files are found and sent."""
    data = {"source": str(args.data) if args.data else "builtin", "online": args.online}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "experts": recipe.experts.model_copy(update={"tasks": (args.task,)}),
        }
    )


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of a recipe's [experts] that the command line sets."""
    options = {
        "method": args.method,
        "num_steps": args.steps,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }
    return {key: value for key, value in options.items() if value is not None}


def show_expert(expert: Expert, path: Path, lora: float, *, as_json: bool) -> None:
    """Print where an expert is, by which method it was trained, its score on the search split, and how small it is.

    `lora` is what `lora_ratio` says.
    """
    from .expert import LORA_RANK

    score, method = dict(expert.score or {}), expert.settings["method"]
    if as_json:
        document = {"expert": str(path), "task": expert.domain, "method": method, "score": score}
        size = {"num_parameters": expert.num_parameters, "lora_ratio": round(lora, 2)}
        made_on = expert.settings.get("made_on")
        print(json.dumps({**document, **size, "is_the_base": expert.is_base, "made_on": made_on}))
        return
    share = score["num_right"] / score["num_rows"]
    print(
        f"{path}: {share:.1%} of {score['num_rows']} rows of the search split, {method}, best at step {score['step']}"
    )
    print(
        f"{expert.num_parameters:,} trained values in {len(expert.deltas)} matrices; LoRA of rank {LORA_RANK} has "
        f"{lora:.1f} times as many there"
    )
    if expert.is_base:
        print("no step beat the base: this expert changes nothing")
