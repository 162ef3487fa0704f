"""The arguments of each verb of `havoc`: one function for each verb adds them to the verb's parser.

An option's attribute has the option's name (`--max-new-tokens` is `args.max_new_tokens`), paths are `Path` objects, and
None means that the verb's own settings decide. No heavy module is imported, because these run for `havoc --help`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import difflib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args

from .adapt.tasks.names import ARMS, DOMAINS, Method
from .cores import TorchDevice
from .errors import HavocError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WEIGHT_FORMATS = ("fp32", "fp16", "int8", "int4")
ACTIVATION_DTYPES = ("fp32", "fp16")
BLOCK_SIZES = (16, 32, 64, 128, 256)
COMPUTES = ("fp32", "int8", "w8a8")
QUANTIZERS = ("rtn", "hqq", "k-quant", "gptq")
METHODS = get_args(Method)
DEVICES = get_args(TorchDevice)
RULES = ("delta", "literal", "renorm")
CACHES = ("dynamic", "static")
LOGITS = ("last", "all")
PRESETS = "pico, nano, edge-135m, edge-360m, 7b"
TRACKERS = ("wandb", "trackio")
WAYS = ("prompt", "classifier", "few-shot")
PROFILES = ("quick", "standard", "release")
ENGINES = ("llama_cpp", "genai", "openvino", "hugging_face")
DUEL_GROUPS = ("latency", "memory", "load")


class Parser(argparse.ArgumentParser):
    """An argument parser that explains a mistake in one line, with the nearest right word, and exits 2."""

    def error(self, message: str) -> NoReturn:
        """Print the one line and exit."""
        self.exit(HavocError.exit_code, f"{self.prog}: error: {message} (see '{self.prog} --help')\n")

    def refuse_unknown_options(self, argv: Sequence[str]) -> None:
        """Name a mistyped option itself; argparse would first miss the required one that it was meant to be."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in argv:
            if word == "--":
                return
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                self.error(f"unknown option {name}{did_you_mean(name, known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error line that names the known word nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def add_run(parser: Parser) -> None:
    """`havoc run [RECIPE] [--handoff FILE] [--out DIR]`."""
    recipe_help = "TOML file, or a bundled one: paper, phase7 (default: the bundled nano model)"
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help=recipe_help)
    handoff_help = "adapt the model that phase 6 hands over in this JSON file, and carry its metrics on"
    parser.add_argument("--handoff", type=Path, metavar="FILE", help=handoff_help)
    out = Path("havoc-run")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"where to write (default: {out})")
    _add_cluster(parser, "train experts, score and measure candidates")
    _add_track(parser)
    _add_threads(parser)
    _add_output(parser)


def add_plan(parser: Parser) -> None:
    """`havoc plan MODEL --target NAME`."""
    parser.add_argument("model", metavar="MODEL", help=f"a preset ({PRESETS}), a model directory or a .gguf file")
    _add_target(parser)
    _add_output(parser, quiet=False)


def add_pretrain(parser: Parser) -> None:
    """`havoc pretrain PRESET [--text FILE...] --out DIR`."""
    preset_help = (
        f"the shape to train ({PRESETS}): with --text any that holds the texts' tokens, at least 260; the built-in "
        "corpus has pictures, and of the presets only nano reads them"
    )
    parser.add_argument("preset", metavar="PRESET", help=preset_help)
    text_help = "learn these texts, any UTF-8, instead of the built-in corpus; the end of each is held out"
    parser.add_argument("--text", nargs="+", type=Path, default=(), metavar="FILE", help=text_help)
    tokenizer_help = "folder of a tokenizer.json to use, as `havoc tokenizer train` writes it (default: a new one)"
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help=tokenizer_help)
    parser.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (default: the preset's recipe)")
    _add_device(parser, "trains")
    _add_seed(parser)
    _add_out(parser)
    _add_output(parser)


def add_tokenizer(parser: Parser) -> None:
    """`havoc tokenizer train FILE... [--vocab-size N] --out DIR`."""
    parser.add_argument("action", choices=("train",), help="learn a byte-level BPE; equal texts give equal files")
    parser.add_argument("texts", nargs="+", type=Path, metavar="FILE", help="a text file, UTF-8; their order counts")
    size_help = "ids at most, 4 special tokens and 256 bytes among them (default: 512, what nano has)"
    parser.add_argument("--vocab-size", type=_positive, default=512, metavar="N", help=size_help)
    _add_out(parser)
    _add_output(parser)


def add_import(parser: Parser) -> None:
    """`havoc import DIR|FILE [--out DIR]`."""
    parser.add_argument("directory", type=Path, metavar="BASE", help="a Hugging Face model directory or a .gguf file")
    out_help = "write a GGUF file as a Hugging Face directory (fp32)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out_help)
    _add_output(parser)


def add_train(parser: Parser) -> None:
    """`havoc train BASE --domain math [--data DIR] --out DIR`."""
    _add_base(parser)
    _add_chat(parser)
    task_help = f"task of the expert: {', '.join(DOMAINS)}, another bundled task, or your own TOML file"
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--task", "--domain", dest="task", metavar="NAME", help=task_help)
    classifier_help = "train what chooses between the experts of these tasks, joined by commas, for --dispatch"
    asked.add_argument("--classifier", type=_names, metavar="TASKS", help=classifier_help)
    parser.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (default: the recipe's)")
    _add_method(parser)
    _add_device(parser, "trains", "the recipe's")
    _add_recipe(parser)
    _add_data(parser)
    _add_seed(parser)
    _add_cluster(parser, "train")
    _add_out(parser)
    _add_track(parser)
    _add_threads(parser)
    _add_output(parser)


def _add_method(parser: Parser) -> None:
    method_help = "loss of a step (default: the recipe's; auto is expected-reward if answers can be listed)"
    parser.add_argument("--method", choices=METHODS, help=method_help)
    rate_help = "learning rate of delta = z - 1 (default: the recipe's)"
    parser.add_argument("--learning-rate", type=_rate, metavar="X", help=rate_help)
    parser.add_argument("--force", action="store_true", help="train a finished expert again")


def add_baselines(parser: Parser) -> None:
    """`havoc baselines BASE --task math [--seeds 0,1,2] [--steps 40] --out DIR`."""
    _add_base(parser)
    _add_chat(parser)
    task_help = f"task to learn: {', '.join(DOMAINS)}, another bundled task, or your own TOML file"
    parser.add_argument("--task", required=True, metavar="NAME", help=task_help)
    arms_help = f"arms to train, joined by commas (default: all): {', '.join(ARMS)}"
    parser.add_argument("--arms", type=_names, default=ARMS, metavar="NAMES", help=arms_help)
    seeds_help = "seeds of training, joined by commas; the rows are the same for all (default: 0,1,2)"
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), metavar="N,...", help=seeds_help)
    steps_help = "optimizer steps of each training (default: 40)"
    parser.add_argument("--steps", type=_positive, default=40, metavar="N", help=steps_help)
    parser.add_argument("--prompts", type=_positive, default=16, metavar="N", help="prompts a step (default: 16)")
    rates_help = "learning rates that scales try; search rows choose (default: 0.003,0.01,0.03)"
    parser.add_argument("--rates", type=_rates, default=(3e-3, 1e-2, 3e-2), metavar="X,...", help=rates_help)
    lora_help = "those that LoRA tries, as many (default: 0.0003,0.001,0.003)"
    parser.add_argument("--lora-rates", type=_rates, default=(3e-4, 1e-3, 3e-3), metavar="X,...", help=lora_help)
    parser.add_argument("--rank", type=_positive, default=16, metavar="R", help="rank of LoRA (default: 16)")
    kind_help = "the only kind of matrix whose scales one arm trains (default: down_proj)"
    parser.add_argument("--kind", default="down_proj", metavar="NAME", help=kind_help)
    parser.add_argument("--n", type=_several, default=500, metavar="N", help="gate rows that are scored (default: 500)")
    search_help = "search rows that choose the rate and the step (default: 200)"
    parser.add_argument("--search-rows", type=_several, default=200, metavar="N", help=search_help)
    _add_data(parser)
    _add_out(parser)
    _add_threads(parser)
    _add_output(parser)


def add_search(parser: Parser) -> None:
    """`havoc search BASE --experts DIR --target NAME --out DIR`."""
    _add_base(parser)
    _add_chat(parser)
    parser.add_argument("--experts", type=Path, required=True, metavar="DIR", help="folder of z_vectors_*.safetensors")
    _add_target(parser)
    other_help = "measure costs here though the target is another device; they then prove nothing of its limits"
    parser.add_argument("--on-this-machine", action="store_true", help=other_help)
    _add_device(parser, "answers for candidates", "the recipe's")
    _add_cluster(parser, "score and measure")
    _add_recipe(parser)
    _add_data(parser)
    _add_seed(parser)
    _add_out(parser)
    _add_track(parser)
    _add_threads(parser)
    _add_output(parser)


def add_worker(parser: Parser) -> None:
    """`havoc worker ADDRESS [--measures [auto|cpu|cuda]]`."""
    address_help = "the Dask scheduler's, tcp://127.0.0.1:8786 or tls://HOST:PORT"
    parser.add_argument("address", metavar="ADDRESS", help=address_help)
    measures_help = "also measure: on this machine's card if there is one, else on its CPU, or on the named device"
    parser.add_argument("--measures", nargs="?", const="auto", choices=("auto", "cpu", "cuda"), help=measures_help)
    store_help = "where bases and artifacts are kept (default: $XDG_CACHE_HOME/havoc/worker, or below ~/.cache)"
    parser.add_argument("--store", type=Path, metavar="DIR", help=store_help)
    _add_tls(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _add_cluster(parser: Parser, does: str) -> None:
    cluster_help = f"{does} on the workers of this Dask scheduler, tcp://127.0.0.1:8786 or tls://HOST:PORT"
    parser.add_argument("--cluster", metavar="ADDRESS", help=cluster_help)
    _add_tls(parser)


def _add_tls(parser: Parser) -> None:
    parser.add_argument("--tls-ca", type=Path, metavar="PEM", help="the cluster's certificate authority")
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="this side's certificate, signed by it")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="the certificate's key")


def add_export(parser: Parser) -> None:
    """`havoc export BASE [--experts DIR --alpha ... --live] [--weights int4] [--to onnx|hf|pt] --out DIR`."""
    _add_base(parser)
    parser.add_argument("--experts", type=Path, metavar="DIR", help="folder of z_vectors_*.safetensors")
    alpha_help = f"one weight per expert, in the order {', '.join(DOMAINS)}, then by name"
    parser.add_argument("--alpha", type=_mixture, metavar="A,B,...", help=alpha_help)
    parser.add_argument("--rule", choices=RULES, default="delta", help="how experts are mixed (default: delta)")
    live_help = "keep every expert in the artifact, so that --alpha can be chosen when it runs (default alpha: all 0)"
    parser.add_argument("--live", action="store_true", help=live_help)
    weights_help = "weight format; keep: the blocks of a GGUF file as they are (default: fp32)"
    parser.add_argument("--weights", choices=(*WEIGHT_FORMATS, "keep"), default="fp32", help=weights_help)
    parser.add_argument(
        "--activations", choices=ACTIVATION_DTYPES, default="fp32", help="dtype of computation (default: fp32)"
    )
    _add_blocks(parser)
    _add_graph(parser)
    to_help = "an artifact, a Hugging Face directory, or .pt files of experts and folded model (default: onnx)"
    parser.add_argument("--to", choices=("onnx", "hf", "pt"), default="onnx", help=to_help)
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign it with this private key (PEM, elliptic curve)")
    parser.add_argument("--replace", action="store_true", help="replace an artifact made from something else")
    _add_out(parser)
    _add_output(parser)


def _add_blocks(parser: Parser) -> None:
    size_help = "weights that share a scale in int8 and int4 (default: 32)"
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=32, help=size_help)
    parser.add_argument("--asymmetric", action="store_true", help="give each block its own zero point")
    quantizer_help = "how values and scales are chosen; hqq and k-quant need --asymmetric (default: rtn)"
    parser.add_argument("--quantizer", choices=QUANTIZERS, default="rtn", help=quantizer_help)
    bits_help = "store int4's most sensitive matrices as int8, up to this many bits per weight, scales included"
    parser.add_argument("--bits", type=float, metavar="B", help=bits_help)
    text_help = "text that gptq and --bits calibrate on and the format's cost is measured on (default: bundled texts)"
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=text_help)
    compute_help = "rounding of activations in products with int8 and int4 (default: auto, int8); w8a8: to int8 with"
    compute_help += " one scale per token, for faster prompts with int8 weights on a CPU"
    parser.add_argument("--compute", choices=("auto", *COMPUTES), default="auto", help=compute_help)
    rank_help = "share of each projection's rank to keep, as two factors if they are smaller (default: 1)"
    parser.add_argument("--rank", type=float, default=1.0, metavar="F", help=rank_help)


def _add_graph(parser: Parser) -> None:
    from .export.runtime.devices import DEVICE_KINDS
    from .export.runtime.dialects import DIALECTS

    dialect_help = "operators of the graph; auto: the best for --for (default: standard, with --for auto)"
    parser.add_argument("--dialect", choices=(*DIALECTS, "auto"), help=dialect_help)
    device_help = "where the graph will run (default: cpu)"
    parser.add_argument("--for", dest="device", choices=tuple(DEVICE_KINDS), help=device_help)
    proof_help = "prove the graph also on an NVIDIA card (default: cpu, where it is always proven)"
    parser.add_argument("--device", dest="proven_on", choices=tuple(DEVICE_KINDS), help=proof_help)
    cache_help = "a cache that grows, or one of fixed length that is written in place (default: dynamic)"
    parser.add_argument("--cache", choices=CACHES, default="dynamic", help=cache_help)
    length_help = "tokens that a static cache holds (default: the model's context)"
    parser.add_argument("--cache-len", type=_positive, metavar="N", help=length_help)
    parser.add_argument(
        "--logits", choices=LOGITS, default="last", help="of the last token, or of every one (default: last)"
    )


def add_verify(parser: Parser) -> None:
    """`havoc verify ARTIFACT [--base BASE --experts DIR] [--public-key PEM] [--record FILE] [--out FILE]`."""
    _add_artifact(parser)
    parser.add_argument("--base", metavar="BASE", help="fold again from this base and compare")
    parser.add_argument("--experts", type=Path, metavar="DIR", help="the experts to fold again (default: its own)")
    text_help = "the text it was calibrated on, if that was not the bundled one"
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=text_help)
    parser.add_argument("--public-key", type=Path, metavar="PEM", help="check its signature by this key")
    parser.add_argument("--record", type=Path, metavar="FILE", help="it must be the artifact this record was made from")
    out_help = "write the verification into this file, for `havoc gate --verified`"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out_help)
    _add_output(parser)


def add_eval(parser: Parser) -> None:
    """`havoc eval ARTIFACT|BASE [--domain math] [--alpha math=1] [--n 1000] [--seed 0]`."""
    _add_model_or_artifact(parser)
    _add_alpha(parser, also="; with --experts the fixed mixture to compare with")
    _add_chat(parser)
    _add_tasks(parser)
    parser.add_argument("--n", type=_positive, metavar="N", help="rows per task (default: the task's, mostly 1000)")
    parser.add_argument("--split", choices=("search", "gate"), default="gate", help="default: gate")
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer (default: the task's)")
    _add_data(parser)
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the built-in rows (default: 0)")
    mixed_help = "also the share over all rows of all tasks, as one stream; --experts has it always"
    parser.add_argument("--mixed", action="store_true", help=mixed_help)
    dispatch_help = f"compare two-pass inference on a base, joined by commas: {', '.join(WAYS)}"
    parser.add_argument("--dispatch", type=_ways, default=(), metavar="WAYS", help=dispatch_help)
    _add_dispatch(parser)
    _add_device(parser, "answers", "cpu for a base; for an artifact cuda if there is a card, else cpu")
    _add_threads(parser)
    _add_output(parser)


def _add_dispatch(parser: Parser) -> None:
    """The options of two-pass inference that `eval` and `generate` share, without --dispatch itself."""
    parser.add_argument("--experts", type=Path, metavar="DIR", help="folder of z_vectors_*.safetensors to choose from")
    examples_help = "few-shot: solved rows of the task that alpha is found on (default: 5)"
    parser.add_argument("--examples", type=_positive, metavar="K", help=examples_help)
    file_help = "few-shot: read the solved rows from this file (default: the task's train split)"
    parser.add_argument("--examples-from", type=Path, metavar="FILE", help=file_help)
    parser.add_argument("--population", type=_several, metavar="N", help="few-shot: mixtures a round (default: 32)")
    elite_help = "few-shot: the best of a round that the next is drawn around (default: 0.2)"
    parser.add_argument("--elite-share", type=_share, metavar="SHARE", help=elite_help)
    parser.add_argument("--generations", type=_positive, metavar="N", help="few-shot: rounds (default: 10)")
    bounds_help = "few-shot: lowest and highest weight of an expert (default: 0,1)"
    parser.add_argument("--alpha-bounds", type=_mixture, metavar="LOW,HIGH", help=bounds_help)


def add_bench(parser: Parser) -> None:
    """`havoc bench ARTIFACT|MODEL [--engine NAME] [--profile quick|standard|release] --out DIR`."""
    model_help = "a directory that `havoc export` wrote, or another engine's model: a .gguf file or a folder"
    parser.add_argument("artifact", nargs="+", metavar="ARTIFACT", help=model_help)
    engine_help = (
        "let another engine run it (default: the one that it is made for; an artifact: HAVOC's own runtime); all: a "
        "table of every engine that is installed, of one or more models"
    )
    parser.add_argument("--engine", choices=(*ENGINES, "all"), help=engine_help)
    _add_engine_python(parser)
    _add_alpha(parser)
    _add_chat(parser)
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="how long to measure (default: quick)")
    parser.add_argument("--provider", metavar="NAME", help="ONNX Runtime execution provider (default: the best here)")
    accuracy_help = "rows per task for accuracy, 0: none (default: the task's, mostly 1000)"
    parser.add_argument("--n", type=_count, metavar="N", help=accuracy_help)
    _add_tasks(parser)
    _add_data(parser)
    _add_out(parser)
    target_help = "measure this target's workload, on its provider and threads (default: a prompt of 512 tokens)"
    parser.add_argument("--target", metavar="NAME", help=target_help)
    prompt_help = "tokens of the prompt, and of the context that decoding begins with"
    parser.add_argument("--prompt-tokens", type=_positive, metavar="N", help=f"{prompt_help} (default: 512)")
    parser.add_argument("--decode-tokens", type=_several, metavar="N", help="tokens to decode (default: 128)")
    parser.add_argument("--batch", type=_positive, metavar="N", help="prompts at once; rates are of each (default: 1)")
    passes_help = "how often a timed prompt is read: 2 if a first pass chooses the expert (default: 1)"
    parser.add_argument("--passes", type=_positive, metavar="N", help=passes_help)
    threads_help = "threads that compute (default: one a physical core)"
    parser.add_argument("--threads", type=_positive, metavar="N", help=threads_help)
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign the record with this private key (PEM)")
    challenge_help = "sign it in answer to this nonce, which the judge has chosen"
    parser.add_argument("--challenge", metavar="NONCE", help=challenge_help)
    graph_help = "run the single steps of a static cache as a CUDA graph, on a card"
    parser.add_argument("--cuda-graph", dest="captures_steps", action="store_true", help=graph_help)
    wait_help = "wait up to this long for a machine that does nothing else, 0: not at all (default: 30)"
    parser.add_argument("--wait", type=_count, default=30, metavar="SECONDS", help=wait_help)
    replace_help = "measure again into a folder that holds a record; its report is removed"
    parser.add_argument("--replace", action="store_true", help=replace_help)
    _add_output(parser)


def _add_tasks(parser: Parser, what: str = "score this task", default: str = "") -> None:
    default = default or f" (default: those of {', '.join(DOMAINS)} that the model reads)"
    which = f"a bundled one or a TOML file of your own{default}"
    task_help = f"{what}, repeat for several: {which}; --domain is another word for it"
    parser.add_argument("--task", "--domain", dest="task", action="append", metavar="NAME", help=task_help)
    shots_help = "solved rows before every question (default: the task's)"
    parser.add_argument("--few-shot", type=_count, metavar="N", help=shots_help)


def add_gate(parser: Parser) -> None:
    """`havoc gate RECORD... --target NAME [--artifact DIR]`."""
    parser.add_argument(
        "records", nargs="+", type=Path, metavar="RECORD", help="record.json, or its folder, of each session"
    )
    _add_target(parser)
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="check that the record is of this artifact")
    parser.add_argument("--verified", type=Path, metavar="FILE", help="what `havoc verify --out FILE` found of it")
    keyring_help = "every record must be signed by this public key, or by one of the *.pem of this folder"
    parser.add_argument("--require-signature", dest="keyring", type=Path, metavar="KEYRING", help=keyring_help)
    nonce_help = "the signature must answer this challenge"
    parser.add_argument("--nonce", metavar="NONCE", help=nonce_help)
    _add_output(parser, quiet=False)


def add_compare(parser: Parser) -> None:
    """`havoc compare RECORD RECORD`."""
    parser.add_argument(
        "records", nargs=2, type=Path, metavar="RECORD", help="the old and the new record.json, or their folders"
    )
    margin_help = "ratios this near to 1 are equal (default: 0.05)"
    parser.add_argument("--margin", type=_share, default=0.05, metavar="SHARE", help=margin_help)
    fail_help = "exit with 1 if any metric is proven worse (default: exit with 0 for any result)"
    parser.add_argument("--fail-if", choices=("worse",), metavar="worse", help=fail_help)
    parser.add_argument("--across", action="store_true", help="compare even different devices or versions")
    _add_output(parser, quiet=False)


def add_duel(parser: Parser) -> None:
    """`havoc duel OLD NEW`."""
    parser.add_argument("old", metavar="OLD", help="artifact of the last release, or another engine's model")
    parser.add_argument("new", metavar="NEW", help="artifact, or another engine's model, that must not be slower")
    margin_help = "how much worse is allowed, and how near is equal (default: 0.05)"
    parser.add_argument("--margin", type=_share, default=0.05, metavar="SHARE", help=margin_help)
    on_help = "what decides: latency (prefill and decode steps), memory, load, joined by commas (default: latency)"
    parser.add_argument("--on", type=_groups, default=("latency",), metavar="WHAT,...", help=on_help)
    _add_tasks(parser, "compare answers to this task row by row", " (default: none)")
    parser.add_argument("--n", type=_positive, metavar="N", help="rows per task (default: the task's, mostly 1000)")
    rows_help = "how much smaller the share of right rows may be (default: 0.02)"
    parser.add_argument("--accuracy-margin", type=_share, default=0.02, metavar="SHARE", help=rows_help)
    _add_data(parser)
    _add_chat(parser)
    reference_help = "also show how far both are from this model: KL divergence of the next token on a text"
    parser.add_argument("--reference", metavar="MODEL", help=reference_help)
    time_help = "measure at most this long; it ends as soon as the answer is proven (default: 300)"
    parser.add_argument("--max-time", type=_positive, default=300, metavar="SECONDS", help=time_help)
    parser.add_argument("--provider", metavar="NAME", help="ONNX Runtime execution provider (default: the CPU's)")
    prompt_help = "tokens of the prompt (default: 512)"
    parser.add_argument("--prompt-tokens", type=_positive, default=512, metavar="N", help=prompt_help)
    parser.add_argument("--decode-tokens", type=_several, default=128, metavar="N", help="default: 128")
    threads_help = "threads of each (default: 1, which other work disturbs least)"
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help=threads_help)
    _add_engine_python(parser)
    _add_markdown(parser)
    _add_output(parser)


def add_history(parser: Parser) -> None:
    """`havoc history DIR`."""
    directory_help = "folder of records: record.json of every folder below it, or *.json"
    parser.add_argument("directory", type=Path, metavar="DIR", help=directory_help)
    target_help = "only records of its device and work (default: all, each work by itself)"
    parser.add_argument("--target", metavar="NAME", help=target_help)
    margin_help = "smaller steps do not count as a change (default: 0.01)"
    parser.add_argument("--margin", type=_share, default=0.01, metavar="SHARE", help=margin_help)
    since_help = "do not fail for alarms whose first bad record is older, such as 2026-11-20: they are known"
    parser.add_argument("--since", type=_day, metavar="DATE", help=since_help)
    fail_help = "exit with 1 if an alarm stands (default: exit with 0 for any result)"
    parser.add_argument("--fail-if", choices=("alarm",), metavar="alarm", help=fail_help)
    _add_markdown(parser)
    _add_output(parser, quiet=False)


def add_report(parser: Parser) -> None:
    """`havoc report DIR`."""
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="folder that holds record.json, or a search that is running"
    )
    target_help = "judge against it, repeat for several (default: host)"
    parser.add_argument("--target", action="append", metavar="NAME", help=target_help)
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="check that the record is of this artifact")
    parser.add_argument("--verified", type=Path, metavar="FILE", help="what `havoc verify --out FILE` found of it")
    _add_output(parser, quiet=False)


def add_watch(parser: Parser) -> None:
    """`havoc watch DIR`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the --out of a run or a search")
    parser.add_argument("--once", action="store_true", help="show the status once and end, even if it is not finished")
    every_help = "seconds between two looks (default: 2)"
    parser.add_argument("--every", type=_positive, default=2, metavar="SECONDS", help=every_help)
    _add_output(parser, quiet=False)


def add_generate(parser: Parser) -> None:
    """`havoc generate ARTIFACT|BASE [--alpha math=1,code=0.5] --prompt TEXT`."""
    _add_model_or_artifact(parser)
    _add_alpha(parser)
    _add_chat(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads stdin")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture for a vision model: PNG, JPEG, TIFF")
    parser.add_argument("--max-new-tokens", type=_positive, default=80, metavar="N", help="default: 80")
    context_help = "allow this many tokens for prompt and answer, more than the base's context: RoPE is extrapolated"
    parser.add_argument("--context", type=_positive, metavar="N", help=context_help)
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="0 is greedy (default)")
    _add_seed(parser)
    dispatch_help = "two passes: the first chooses the expert or mixture, the second answers with it"
    parser.add_argument("--dispatch", choices=WAYS, help=dispatch_help)
    _add_dispatch(parser)
    parser.add_argument("--task", metavar="NAME", help="few-shot: the task that the solved rows are of")
    _add_data(parser)
    _add_output(parser, quiet=False)


def add_doctor(parser: Parser) -> None:
    """`havoc doctor`."""
    _add_output(parser, quiet=False)


def _add_alpha(parser: Parser, also: str = "") -> None:
    alpha_help = f"mixture of a live artifact, such as math=1,code=0.5; others get 0 (default: the exported one){also}"
    parser.add_argument("--alpha", type=_named_weights, metavar="NAME=W,...", help=alpha_help)


def _add_out(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write, and nowhere else")


def _add_base(parser: Parser) -> None:
    parser.add_argument("base", metavar="BASE", help=f"a preset ({PRESETS}), a model directory or a .gguf file")


def _add_engine_python(parser: Parser) -> None:
    python_help = "interpreter that has the other engine's package, repeat for several (default: this one)"
    parser.add_argument("--engine-python", type=Path, action="append", default=[], metavar="FILE", help=python_help)


def _add_artifact(parser: Parser) -> None:
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a directory that `havoc export` wrote")


def _add_model_or_artifact(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="ARTIFACT|BASE", help="an exported directory, a base directory, a .gguf file or a preset"
    )


def _add_threads(parser: Parser) -> None:
    threads_help = "threads of each job (default: as many as the model's size is worth)"
    parser.add_argument("--threads", type=_positive, metavar="N", help=threads_help)


def _add_device(parser: Parser, what: str, default: str = "cpu") -> None:
    device_help = f"what {what}: the CPU, or an NVIDIA card (default: {default})"
    parser.add_argument("--device", choices=DEVICES, help=device_help)


def _add_chat(parser: Parser) -> None:
    chat_help = "use prompts without the model's chat template"
    parser.add_argument("--no-chat", dest="is_chat", action="store_false", help=chat_help)


def _add_target(parser: Parser) -> None:
    parser.add_argument("--target", required=True, metavar="NAME", help="host, gtx1660, or a TOML file of your own")


def _add_recipe(parser: Parser) -> None:
    recipe_help = "settings: a TOML file, or the name of a bundled recipe (default: those of the bundled nano)"
    parser.add_argument("--recipe", type=Path, metavar="TOML", help=recipe_help)


def _add_data(parser: Parser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="real data sets on disk (default: built-in tasks)")
    parser.add_argument("--online", action="store_true", help="may fetch data sets from the hub (default: offline)")


def _add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=_count, metavar="N", help="seed of every random choice")


def _add_track(parser: Parser) -> None:
    track_help = f"send the metrics to these trackers, joined by commas: {', '.join(TRACKERS)} (default: the recipe's)"
    parser.add_argument("--track", type=_trackers, metavar="NAMES", help=track_help)


def _ways(text: str) -> tuple[str, ...]:
    ways = _names(text)
    for way in ways:
        if way not in WAYS:
            hint = did_you_mean(way, WAYS) or f"; known are {', '.join(WAYS)}"
            raise argparse.ArgumentTypeError(f"unknown way of dispatch {way!r}{hint}")
    return tuple(dict.fromkeys(ways))


def _groups(text: str) -> tuple[str, ...]:
    groups = _names(text)
    for group in groups:
        if group not in DUEL_GROUPS:
            hint = did_you_mean(group, DUEL_GROUPS) or f"; known are {', '.join(DUEL_GROUPS)}"
            raise argparse.ArgumentTypeError(f"a duel cannot be decided on {group!r}{hint}")
    if not groups:
        raise argparse.ArgumentTypeError(f"a duel is decided on one or more of {', '.join(DUEL_GROUPS)}")
    return tuple(dict.fromkeys(groups))


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _trackers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) or f"; known are {', '.join(TRACKERS)}"
            raise argparse.ArgumentTypeError(f"unknown tracker {name!r}{hint}")
    return names


def _add_output(parser: Parser, *, quiet: bool = True) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    if quiet:
        parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _add_markdown(parser: Parser) -> None:
    parser.add_argument("--markdown", action="store_true", help="Markdown on stdout, for a pull request's comment")


def _day(text: str) -> str:
    """A day as YYYY-MM-DD."""
    try:
        return dt.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date: write it as 2026-11-20") from None


def _count(text: str) -> int:
    return _whole_number(text, 0)


def _positive(text: str) -> int:
    return _whole_number(text, 1)


def _several(text: str) -> int:
    return _whole_number(text, 2)


def _whole_number(text: str, low: int) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= low:  # noqa: PLR2004 - fits 64 bits
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")


def _share(text: str) -> float:
    return _number(text, 0.0, 1.0, "a number from 0 to 1")


def _rate(text: str) -> float:
    number = _number(text, 0.0, 10.0, "a number above 0 and at most 10")
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 10")
    return number


def _rates(text: str) -> tuple[float, ...]:
    return tuple(_rate(part) for part in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _temperature(text: str) -> float:
    what = "0 (greedy) or a number from 0.001 to 1000"
    value = _number(text, 0.0, 1000.0, what)
    return value and _number(text, 0.001, 1000.0, what)  # logits over less, or more, are no distribution any longer


def _mixture(text: str) -> tuple[float, ...]:
    limit = sys.float_info.max
    return tuple(_number(part, -limit, limit, "a list of numbers like 1.2,0.8,1.5,0.9") for part in text.split(","))


def _named_weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if not name or not equals or name in weights:
            raise argparse.ArgumentTypeError(f"{text!r} does not name each expert once, like math=1,code=0.5")
        weights[name] = _number(weight, -sys.float_info.max, sys.float_info.max, "a number like math=1")
    return weights


def _number(text: str, low: float, high: float, what: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)) and low <= value <= high:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
