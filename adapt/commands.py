"""Handlers of the verbs that make experts and bases: `havoc train` and `havoc pretrain`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from ..config import load_recipe
from ..errors import HavocError
from ..progress import make_progress

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from ..config import ExpertSettings
    from ..model.checkpoint import Base
    from ..progress import Progress
    from .basis import Basis
    from .reinforce import ReinforceSettings


def handle_pretrain(args: argparse.Namespace) -> int:
    """Train a base from scratch on the built-in corpus and say where it is."""
    from .pretrain import PretrainSettings, pretrain

    settings = PretrainSettings()
    changes = {"num_steps": args.steps, "seed": args.seed}
    settings = dataclasses.replace(settings, **{key: value for key, value in changes.items() if value is not None})
    out = pretrain(args.preset, args.out, settings=settings, progress=make_progress(quiet=args.quiet))
    print(json.dumps({"base": str(out)}) if args.json else f"base written to {out}")
    return 0


def handle_train(args: argparse.Namespace) -> int:
    """Train one expert of a base and write its file."""
    from ..model.checkpoint import load_base
    from .expert import save_expert
    from .reinforce import forget_training, train_expert

    progress = make_progress(quiet=args.quiet)
    base = load_base(args.base, is_chat=args.is_chat)
    _ = base.tokenizer  # a base that cannot read text is refused before the minutes that a basis takes
    basis = base_basis(base, args.out, progress)
    changes = {"num_steps": args.steps, "seed": args.seed}
    changed = {key: value for key, value in changes.items() if value is not None}
    settings = reinforce_settings(load_recipe(args.recipe).experts.model_copy(update=changed))
    expert = train_expert(
        base,
        basis,
        args.domain,
        settings=settings,
        checkpoint_dir=args.out,
        data_dir=args.data,
        online=args.online,
        progress=progress,
    )
    path = save_expert(expert, args.out)
    forget_training(args.out, args.domain)
    score = dict(expert.score or {})
    is_the_base = not any(bool(delta.any()) for delta in expert.deltas.values())
    if args.json:
        print(json.dumps({"expert": str(path), "domain": args.domain, "score": score, "is_the_base": is_the_base}))
    else:
        share = score["num_right"] / score["num_rows"]
        print(f"{path}: {share:.1%} of {score['num_rows']} rows of the search split, best at step {score['step']}")
        if is_the_base:
            print("no step beat the base: this expert changes nothing")
    return 0


def base_basis(base: Base, out: Path, progress: Progress) -> Basis:
    """Return the basis of `base`, from `out`/basis.safetensors if it is there and fits."""
    from .basis import cached_basis

    if base.directory is None:
        msg = "a preset with random weights knows nothing an expert could build on; give a trained base"
        raise HavocError(msg)
    return cached_basis(
        out / "basis.safetensors",
        base.tensors(),
        base_hash=base.weight_hash,
        progress=progress,
    )


def reinforce_settings(experts: ExpertSettings) -> ReinforceSettings:
    """Translate a recipe's section into the trainer's settings."""
    from .optimizer import MuGrokConfig
    from .reinforce import ReinforceSettings

    optimizer = dataclasses.replace(
        MuGrokConfig.from_phase(7), fallback_lr=experts.learning_rate, kl_coefficient=experts.kl_coefficient
    )
    return ReinforceSettings(
        seed=experts.seed,
        num_steps=experts.num_steps,
        prompts_per_step=experts.prompts_per_step,
        samples_per_prompt=experts.samples_per_prompt,
        max_new_tokens=experts.max_new_tokens,
        num_validation_rows=experts.num_validation_rows,
        optimizer=optimizer,
    )
