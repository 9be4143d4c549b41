"""What is installed, what of it works here, what is missing, and which programs can use it; with
--call, which kernel of which backend serves a call, on this machine or on an architecture.

    python -m flash_attn info
    python -m flash_attn info --call --seqlen 4096 --head-dim 192 --dropout 0.1 --arch 90

Exits with 0 if the CPU and every visible GPU can be used, with --call if a backend serves the call;
with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from flash_attn.commands.kernels import add_target_options, serve, target_of, text_of_served
from flash_attn.commands.report import is_complete, make_report, text_of
from flash_attn.verify import add_problem_options, problem_of

_NO_DEFAULT = {"default": argparse.SUPPRESS}  # what is given can then be told from what is not


def _call_options(add: Callable[..., object]) -> None:
    add_problem_options(add)
    add_target_options(add)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--call", action="store_true", help="say what serves the call below")
    group = parser.add_argument_group("the call, with --call")
    _call_options(lambda *names, **kind: group.add_argument(*names, **{**kind, **_NO_DEFAULT}))


def run(options: argparse.Namespace) -> int:
    usual = argparse.ArgumentParser()
    _call_options(usual.add_argument)
    call = usual.parse_args([])
    given = [name for name in vars(call) if name in options]
    if options.call:
        vars(call).update(vars(options))
        return _run_call(call)
    if given:
        options.error(f"--{given[0].replace('_', '-')}: expected with --call, which is missing")
    report = make_report()
    print(json.dumps(asdict(report), indent=1) if options.json else text_of(report))
    return 0 if is_complete(report) else 1


def _run_call(options: argparse.Namespace) -> int:
    target = target_of(options)
    problem = problem_of(options, on_gpu=target.arch is not None)
    served = serve(problem, target, packed=options.packed)
    if options.json:
        result = {"problem": asdict(problem), "target": asdict(target), **asdict(served)}
        result["packed"] = options.packed
        print(json.dumps(result, indent=1))
    else:
        print(text_of_served(problem, target, served, options.packed))
    return 0 if all(choice.backend for choice in served.passes.values()) else 1
