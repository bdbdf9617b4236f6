"""The `mae-et` command: the only file that knows every part.

Exit status: 0 on success, 2 for a user's mistake, 1 for a run that failed, 128 + signal for a run
that was told to stop. Commands that end with figures print them last, as one line of JSON.
"""

import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from mae_et.cli.arguments import Arguments, config_of, on_top_of_its_data, parser_of
from mae_et.config.files import one_sentence, parse_config
from mae_et.config.schema import PretrainConfig
from mae_et.errors import Interrupted, RunFailed, UserError
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.version import __version__

IMAGENET_1K = 1_281_167


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _one_line_warning
    try:
        return run(given)
    except (UserError, RunFailed) as error:
        # Raised in a loader process it arrives with that process's traceback, which it ends.
        sentence = re.sub(r"^mae_et\.errors\.\w+: ", "", str(error).strip().splitlines()[-1])
        print(f"mae-et: {sentence}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:  # a full disk, a folder that went away
        print(f"mae-et: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"mae-et: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("mae-et: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130


def run(given: Arguments) -> int:
    """Run a command line and return its exit status.

    Raises:
        UserError: the command line, or what it names, cannot be used.
        RunFailed: a run could not go on, or memory or the disk ran out.
        Interrupted: a run was told to stop, and has saved.
    """
    if given in (["--version"], ["-V"]):
        print(f"mae-et {__version__}")
        return 0
    if not given or given[0] in {"-h", "--help"}:
        print(usage())
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; commands: {', '.join(COMMANDS)}")
    with explain_system_errors():
        COMMANDS[name](rest)
    return 0


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        f"  {name:<{width}}{(command.__doc__ or '').splitlines()[0]}"
        for name, command in COMMANDS.items()
    ]
    head = "usage: mae-et COMMAND [--config FILE_OR_NAME ...] [--key value ...]"
    return "\n".join([head, "", *lines, "", "mae-et COMMAND --help lists a command's keys."])


# --- commands -------------------------------------------------------------------------------------


def plan(arguments: Arguments) -> None:
    """Print stages, steps, epochs, images, FLOPs, and the cost against constant bandwidth."""
    from mae_et.curriculum.table import COMPUTE_UNITS, plan_table, summarise
    from mae_et.curriculum.throughput import throughput_from_options, throughput_table
    from mae_et.data.datasets import open_dataset
    from mae_et.training.plan import make_plan

    parser = parser_of("plan", PretrainConfig)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument(
        "--against-epochs",
        type=float,
        default=1600.0,
        help="epochs of the constant-bandwidth baseline",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=None,
        help="images of an epoch, where the data are not at hand",
    )
    speed = "images/s at each bandwidth, '{96: 5200, 224: 1200}' or a finished run's folder"
    parser.add_argument("--throughput", type=str, default=None, help=f"of one GPU: {speed}")
    parser.add_argument("--loader", type=str, default=None, help=f"of one loader core: {speed}")
    parser.add_argument("--gpus", type=str, default=None, help="GPU counts: 1,8,64 (1 to 1024)")
    parser.add_argument("--cores-per-gpu", type=float, default=None, help="loader cores of a GPU")
    config, extra = parse_config(parser, PretrainConfig, arguments)
    images = extra["images"]
    if images is not None and not 0 < images < 10**15:
        raise UserError(f"images must lie in (0, 1e15), got {str(images)[:40]}")
    if images is None:
        if config.data.source == "folder" and config.data.root is None:
            images = IMAGENET_1K
            print("mae-et: no data.root: planned for the images of ImageNet-1K", file=sys.stderr)
        else:
            images = len(open_dataset(config.data, "train", config.model.channels))
    resolved = make_plan(config, images)
    unit = COMPUTE_UNITS[config.curriculum.cost]
    summary = summarise(resolved, unit, extra["against_epochs"])
    speeds = throughput_from_options(resolved, extra)
    if extra["json"]:
        _print_json(summary | ({} if speeds is None else {"throughput": speeds}))
    else:
        print(plan_table(summary))
        if speeds is not None:
            print("\n" + throughput_table(speeds))


def pretrain(arguments: Arguments) -> None:
    """Pre-train a masked autoencoder; goes on by itself where the run folder's run stopped."""
    from mae_et.pretraining import pretrain
    from mae_et.runtime.distributed import is_main

    folder = pretrain(config_of("pretrain", arguments))
    if is_main():
        _print_run(folder, {})


def knn(arguments: Arguments) -> None:
    """Score a pre-trained encoder by weighted k-nearest neighbours."""
    import finetune

    _print_json(finetune.knn(_probe_config("knn", arguments)))


def linear_probe(arguments: Arguments) -> None:
    """Score a pre-trained encoder by a linear classifier on its frozen features."""
    import finetune

    _print_json(finetune.linear_probe(_probe_config("linear-probe", arguments)))


def reconstruct(arguments: Arguments) -> None:
    """Write a PNG of images, masked, reconstructed and pasted."""
    from mae_et.config.commands import ReconstructConfig
    from mae_et.reconstruction import reconstruct

    config, _ = parse_config(
        parser_of("reconstruct", ReconstructConfig), ReconstructConfig, arguments
    )
    _print_json({"picture": str(reconstruct(config))})


def export(arguments: Arguments) -> None:
    """Write a checkpoint in the layout of timm, Hugging Face or MAE."""
    from mae_et.checkpoints.export import export
    from mae_et.config.commands import ExportConfig

    config, _ = parse_config(parser_of("export", ExportConfig), ExportConfig, arguments)
    path = export(
        config.checkpoint,
        config.format,
        config.output,
        config.encoder_num_heads,
        config.decoder_num_heads,
    )
    _print_json({"format": config.format, "output": str(path)})


def demo(arguments: Arguments) -> None:
    """Pre-train, probe and picture a small model: minutes on two CPU cores."""
    from finetune import ProbeConfig, score_encoder
    from mae_et.pretraining import pretrain
    from mae_et.runtime.distributed import is_main

    parser = parser_of("demo", PretrainConfig)
    config, _ = parse_config(parser, PretrainConfig, ["--config=demo", *arguments])
    if config.output.dir == Path("runs/demo") and config.data.source != "synthetic":
        # Other data is another run.
        name = config.data.root.resolve().name if config.data.root else config.data.source
        output = replace(config.output, dir=Path(f"runs/demo-{name}"))
        config = replace(config, output=output)
    folder = pretrain(config)
    if not is_main():
        return
    efficiency = config.efficiency
    probe = ProbeConfig(
        folder, untrained=True, num_workers=efficiency.num_workers, device=efficiency.device
    )
    try:
        accuracies = score_encoder(probe)
    except UserError as error:  # unlabelled images, most likely
        print(f"mae-et: not scored: {error}", file=sys.stderr)
        accuracies = {}
    _print_run(folder, accuracies)


def finetune(arguments: Arguments) -> None:
    """Fine-tune or probe a checkpoint on labelled images."""
    _classify("finetune", arguments)


def supervised(arguments: Arguments) -> None:
    """Train a timm backbone from scratch, under a curriculum if asked for."""
    _classify("supervised", arguments)


def evaluate(arguments: Arguments) -> None:
    """Score a fine-tuned checkpoint: top-1, top-5, loss, confusion table."""
    import finetune
    from mae_et.runtime.distributed import is_main

    kind, stored = finetune.EvaluateConfig, finetune.read_classifier_config
    config = on_top_of_its_data("evaluate", kind, stored, arguments)
    results = finetune.evaluate(config)
    if is_main():
        _print_json(results)


def prepare(arguments: Arguments) -> None:
    """Write a data set as shards at several sizes, for --data.name shards."""
    from mae_et.data.prepare import prepare

    _print_json(prepare(config_of("prepare", arguments)))


def compare(arguments: Arguments) -> None:
    """Put the results of several runs into one table: compare RUN... [--output table.md]."""
    from mae_et.monitoring.compare import compare

    print(compare(config_of("compare", arguments)), flush=True)


def report(arguments: Arguments) -> None:
    """Write an HTML file about runs, to open offline: report RUN... [--output report.html]."""
    from mae_et.monitoring.report import report

    parser = ArgumentParser(
        prog="mae-et report", exit_on_error=False, description="Write an HTML file about runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file")
    try:
        given = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(one_sentence(error)) from None
    _print_json({"report": str(report(given.runs, given.output))})


def search(arguments: Arguments) -> None:
    """Search a curriculum for a data set and a model; goes on by itself where it stopped."""
    import finetune
    from mae_et.search import search
    from mae_et.search.trials import Objective, Runner, run_here

    config = config_of("search", arguments)
    options = config.search
    objective: Objective
    if options.objective in {"knn", "linear"}:
        objective = finetune.HeldOutAccuracy(
            options.objective, options.held_out, options.images, config.seed,
            config.efficiency.num_workers, config.efficiency.device,
        )  # fmt: skip
        objective.check(config.data, config.model.channels)
    else:
        if not any(word.startswith("--search.objective") for word in arguments):
            raise UserError(
                f"search.objective {options.objective} names code, which a file may not: give it "
                "on the command line"
            )
        objective = _function(options.objective, "search.objective")
    runner: Runner = run_here
    if options.cluster is not None:
        from slurm.command import CommandLine
        from slurm.trials import ClusterRunner

        command_line = CommandLine(config_of, run)
        runner = ClusterRunner(command_line, options.cluster, config.output.dir)
    results = search(config, objective, runner, parallel=options.cluster is not None)
    stages = ", ".join(str(bandwidth) for bandwidth in results["bandwidths"])
    print(
        f"mae-et: found {stages}: {options.objective} {results['value']:.2f}; train with: "
        f"mae-et pretrain --config {results['curriculum']}",
        file=sys.stderr,
    )
    _print_json(results)


def _function(name: str, key: str) -> Callable[[Path], float]:
    """Return what `package.module:function` names, of a package or of the current folder.

    Raises:
        UserError: there is no such function.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key} {name} is not found: {error}") from None
    if not callable(found):
        raise UserError(f"{key} {name} is no function")
    return found


def dynamics(arguments: Arguments) -> None:
    """Score a run's kept checkpoints on validation images of ever less detail."""
    import finetune

    _print_json(finetune.dynamics(config_of("dynamics", arguments)))


def bench(arguments: Arguments) -> None:
    """Measure speed against a plain reference in one run: step, loader, crop, quality, run."""
    from mae_et.benchmarks.command import BENCHMARKS

    if arguments[:1] in (["-h"], ["--help"]):
        for name, (_, start) in BENCHMARKS.items():
            print(f"  {name:<8}{(start.__doc__ or '').splitlines()[0]}")
        print("\nmae-et bench NAME --help lists its keys.")
        sys.exit(0)
    if not arguments or arguments[0] not in BENCHMARKS:
        raise UserError(f"bench needs one of {', '.join(BENCHMARKS)}")
    kind, measure = BENCHMARKS[arguments[0]]
    parser = parser_of(f"bench {arguments[0]}", kind)
    config, _ = parse_config(parser, kind, arguments[1:])
    _print_json(measure(config))


def submit(arguments: Arguments) -> None:
    """Submit a command to SLURM, with what follows it, or a sweep of it."""
    from slurm.cli import submit_command
    from slurm.command import CommandLine

    submit_command(CommandLine(config_of, run), arguments)


def status(arguments: Arguments) -> None:
    """Tell how runs are: job, step, loss, speed, time left, restarts, last error."""
    from slurm.cli import status_command

    status_command(arguments)


COMMANDS: dict[str, Callable[[Arguments], None]] = {
    "demo": demo,
    "plan": plan,
    "pretrain": pretrain,
    "finetune": finetune,
    "supervised": supervised,
    "evaluate": evaluate,
    "knn": knn,
    "linear-probe": linear_probe,
    "reconstruct": reconstruct,
    "export": export,
    "prepare": prepare,
    "compare": compare,
    "report": report,
    "search": search,
    "dynamics": dynamics,
    "bench": bench,
    "submit": submit,
    "status": status,
}


# --- shared by the commands -----------------------------------------------------------------------


def _classify(command: str, arguments: Arguments) -> None:
    import finetune
    from mae_et.runtime.distributed import is_main

    config = config_of(command, arguments)
    if command == "finetune" and not (config.data.name or config.data.root):
        start = config.model.checkpoint or config.model.backbone
        if config.model.checkpoint is not None and not config.model.checkpoint.exists():
            raise UserError(f"there is no checkpoint {start}")
        raise UserError(
            f"data must be given (--data.root or --data.name): {start} does not say what it was "
            "trained on"
        )
    results = finetune.classify(config)
    if is_main():
        folder = config.output.dir
        print(f"mae-et: look at it with: tensorboard --logdir {folder}", file=sys.stderr)
        _print_json({"run": str(folder)} | results)


def _probe_config(command: str, arguments: Arguments) -> Any:
    from finetune import ProbeConfig
    from mae_et.checkpoints.load import stored_config

    return on_top_of_its_data(command, ProbeConfig, stored_config, arguments)


def _print_run(folder: Path, accuracies: dict[str, Any]) -> None:
    results = json.loads((folder / "results.json").read_text())
    print(f"mae-et: look at it with: tensorboard --logdir {folder}", file=sys.stderr)
    _print_json({"run": str(folder)} | results | accuracies)


def _print_json(results: dict[str, Any]) -> None:
    print(json.dumps(results), flush=True)


def _one_line_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"mae-et: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
