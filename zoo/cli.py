"""The `zoo` command. Light commands answer from the catalog; training hands over to zoo.engine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from . import __version__, registry, settings
from .catalog import PAPERS, Component
from .errors import ZooError

TRAINING = {
    "fit": "train from a config",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write the predictions of a checkpoint",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, without the usage dump."""
        _, _, rest = message.partition("invalid choice: ")
        if rest:
            # argparse quotes the choices or not, depending on the version of Python
            wrong = rest.split("'")[1]
            choices = [choice.strip(" '") for choice in rest.partition("(choose from ")[2].rstrip(")").split(",")]
            message = f"{wrong!r} is not one of {', '.join(choices)}."
            message += registry.did_you_mean(wrong, choices, n=1)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 if something is broken, 2 for a mistake of the user."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in TRAINING:
        from .engine.cli import main as train

        train(given)
        return 0
    options = _parser().parse_args(given)
    try:
        return options.run(options)
    except BrokenPipeError:  # `zoo list | head`
        return 0
    except ZooError as error:
        if settings.debug():
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zoo", description="Components of recent papers: find them, train them, take them out.")
    parser.add_argument("--version", action="version", version=f"paperzoo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command", dest="command", required=True)
    for name, what in TRAINING.items():
        commands.add_parser(name, help=f"{what}; `zoo {name} --help` lists every option", add_help=False)

    command = commands.add_parser("list", help="components by kind")
    command.add_argument("kind", nargs="?", choices=registry.KINDS, help="only this kind")
    command.add_argument("--tag", help="only with this tag, e.g. language")
    command.add_argument("--paper", choices=sorted(PAPERS), help="only from this paper")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_list)

    command = commands.add_parser("info", help="all that is known about one component")
    command.add_argument("kind", choices=registry.KINDS)
    command.add_argument("name")
    command.set_defaults(run=_info)

    command = commands.add_parser("doctor", help="versions, devices and what is broken")
    command.set_defaults(run=_doctor)

    _add_kernels(
        commands.add_parser("kernels", help="compile the native kernels ahead of time, look at them, clear them")
    )

    _add_explain(commands.add_parser("explain", help="class activation maps of photos: where a model looks"))

    command = commands.add_parser("export", help="weights of a run's checkpoint as one .safetensors file")
    command.add_argument("run_dir", help="directory of the run, e.g. runs/quickstart")
    command.add_argument("-o", "--output", required=True, help="file to write, e.g. model.safetensors")
    command.add_argument("--checkpoint", default="best", choices=("best", "last"), help="which one (default: best)")
    command.set_defaults(run=_export)
    return parser


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="action", dest="action", required=True)
    action = actions.add_parser("build", help="compile the kernels and the CPU library, into the cache or a folder")
    action.add_argument("--arch", metavar="LIST", help="compute capabilities, as 80,90 (default: of the GPUs here)")
    action.add_argument("--out", metavar="DIR", help="a folder to name in ZOO_KERNEL_DIR (default: the cache)")
    action.add_argument("--jobs", type=int, metavar="N", help="threads (default: one a core)")
    action.add_argument("--orders", default="1-5", metavar="N-N", help="of the polynomials, as 3 (default: 1-5)")
    action.add_argument(
        "--cpu",
        action=argparse.BooleanOptionalAction,
        help="the CPU library; a missing C++ compiler is then an error (default: if there is one)",
    )
    action = actions.add_parser("status", help="what is compiled, what can be, and by what")
    action.add_argument("--json", action="store_true", help="as JSON")
    actions.add_parser("clear", help="delete what was compiled from the cache")
    parser.set_defaults(run=_kernels)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photos, explained one by one")
    network = parser.add_argument_group("network (nothing is downloaded)")
    network.add_argument("--model", metavar="NAME", help="a model of timm; left out, the task in the checkpoint")
    network.add_argument(
        "--weights", metavar="FILE", help="state dict, .pth or .safetensors; or demo, see the extra demo"
    )
    network.add_argument(
        "--checkpoint", metavar="FILE", help="of Lightning, e.g. runs/shapes_cnn/checkpoints/best.ckpt"
    )
    network.add_argument("--device", default="auto", help="auto (default), cpu, cuda:1, ...")
    what = parser.add_argument_group("what is explained")
    what.add_argument(
        "--target", default="top1", metavar="CLASS", help="top1 (default), top:3, a number, or a part of a name"
    )
    what.add_argument("--layers", nargs="+", metavar="LAYER", help="names in the network, or last (default: chosen)")
    what.add_argument("--feature-maps", metavar="MAPS", help="only these of the layer: 3,17 or top:9")
    what.add_argument("--neurons", metavar="BOX", help="only those in top,left,bottom,right (half-open)")
    what.add_argument(
        "--space", default="layer", choices=("layer", "input"), help="cells (default) or pixels of --neurons"
    )
    how = parser.add_argument_group("method")
    how.add_argument("--method", default="smooth_grad_cam_pp", metavar="NAME", help="see `zoo list explainer`")
    how.add_argument("--samples", type=int, metavar="N", help="noisy copies (default: 8)")
    how.add_argument("--sigma", type=float, help="noise over the range of the picture's values (default: 0.15)")
    how.add_argument("--seed", type=int, help="of the noise, and of random weights (default: 0)")
    how.add_argument("--fuse", choices=("mean", "max", "product"), help="make one map of several layers'")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--mode",
        default="overlay",
        choices=("overlay", "heat", "grid"),
        help="the maps over the photos, by themselves, or beside them with titles",
    )
    output.add_argument("--out", metavar="PNG", help="default: <photo>_cam.png here, unless --npz or --json is given")
    output.add_argument("--npz", metavar="FILE", help="write the maps as arrays")
    output.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=_explain)


def _list(options: argparse.Namespace) -> int:
    rows = registry.rows(options.kind, tag=options.tag, paper=options.paper)
    if options.json:
        print(json.dumps([_plain(row) for row in rows], indent=2))
        return 0
    width = max((len(row.name) for row in rows), default=0)
    for kind in registry.KINDS:
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind:
            print(kind)
        for row in of_kind:
            print(f"  {row.name:<{width}}  {row.summary}")
    return 0


def _info(options: argparse.Namespace) -> int:
    row = registry.info(options.kind, options.name)
    paper = PAPERS.get(row.paper or "")
    lines = [f"{row.name} ({row.kind}): {row.summary}"]
    if paper is not None:
        lines.append(f"paper      {paper.title}, {paper.authors}, {paper.venue} {paper.year}")
        lines.append(f"           {paper.url or ''} {row.equations}".rstrip())
    lines.append(f"class      {row.target.replace(':', '.')} ({row.dist})")
    lines.append(f"call       {_signature(row)}")  # the one line that needs torch
    lines.append(f"dtypes     {', '.join(row.dtypes)}")
    gradient = ("none", "first order", "first and second order")[row.grad_order]
    lines.append(f"gradient   {gradient}")
    lines.append(f"backends   {', '.join(row.backends)}")
    if row.tags:
        lines.append(f"tags       {', '.join(sorted(row.tags))}")
    print("\n".join(lines))
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from .doctor import diagnose

    text, healthy = diagnose()
    print(text)
    return 0 if healthy else 1


def _kernels(options: argparse.Namespace) -> int:
    from .kernels import commands

    run = {"build": commands.build, "status": commands.status, "clear": commands.clear}[options.action]
    return run(options)


def _explain(options: argparse.Namespace) -> int:
    from .explain import command

    return command.run(options)


def _export(options: argparse.Namespace) -> int:
    from .engine.export import export

    print(export(options.run_dir, options.checkpoint, options.output))
    return 0


def _plain(row: Component) -> dict[str, Any]:
    return {**asdict(row), "tags": sorted(row.tags)}


def _signature(row: Component) -> str:
    import inspect

    cls = registry.get(row.kind, row.name)
    return f"{cls.__name__}{registry.describe_signature(inspect.signature(cls))}"


if __name__ == "__main__":
    sys.exit(main())
