"""`egtrain train`: parse, hand over, print."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from egtrain.cli.importing import ending_at_interrupt
from egtrain.cli.options import (
    AsJson,
    DataDir,
    DataName,
    Device,
    Offline,
    OutputRoot,
    PresetName,
    Settings,
    TaskPath,
    batch_option,
    length_option,
    output_option,
    overrides_of,
    place_option,
    runs_root,
    task_file,
    what_option,
)
from egtrain.errors import DataError, UsageError

if TYPE_CHECKING:
    from egtrain.config.schema import Config
    from egtrain.task_file import TaskFile


def train(
    preset: PresetName = None,
    resume: Annotated[
        Path | None,
        what_option(
            metavar="DIR", help="A run directory to go on with, from its newest checkpoint."
        ),
    ] = None,
    task: TaskPath = None,
    init_from: Annotated[
        Path | None,
        what_option(
            metavar="FILE|RUN",
            help="Begin with these weights: .safetensors, .pt, a checkpoint, or a run's newest.",
        ),
    ] = None,
    init_strict: Annotated[
        bool | None,
        what_option(
            "--init-strict/--no-init-strict",
            help="Refuse weights that do not all fit, or take those that fit.",
        ),
    ] = None,
    settings: Settings = None,
    data: DataName = None,
    data_dir: DataDir = None,
    offline: Offline = False,
    seed: Annotated[
        int | None, what_option(metavar="N", help="Seed of every random choice.")
    ] = None,
    allow_changes: Annotated[
        bool,
        what_option(
            "--allow-changes", help="Resume even if settings differ from those of the run."
        ),
    ] = False,
    epochs: Annotated[int | None, length_option(metavar="N", help="Passes over the data.")] = None,
    steps: Annotated[
        int | None, length_option(metavar="N", help="Updates, instead of epochs.")
    ] = None,
    batch_size: Annotated[
        int | None,
        batch_option(
            metavar="B",
            help="Samples per update, B = K·b; alone, workers keep their b, and K = B/b.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        batch_option(metavar="K", help="Logical workers; alone, they keep their b, and B grows."),
    ] = None,
    device: Device = None,
    nproc: Annotated[
        int | None,
        place_option(
            metavar="N", help="Processes, a GPU each; default: as many GPUs as divide K, or 1."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        place_option(
            metavar="auto|fp32|bf16",
            help="Precision of the arithmetic; auto: bf16 where the device computes in it.",
        ),
    ] = None,
    compile_model: Annotated[
        bool | None,
        place_option("--compile/--no-compile", help="Compile the model with torch.compile."),
    ] = None,
    deterministic: Annotated[
        bool | None,
        place_option(
            "--deterministic/--no-deterministic",
            help="Get the same result, bit for bit, on any number of processes.",
        ),
    ] = None,
    max_restarts: Annotated[
        int, place_option(min=0, metavar="N", help="Restarts after a process has died.")
    ] = 0,
    output: Annotated[
        Path | None,
        output_option(metavar="DIR", help="The run directory; default: ROOT/NAME-TIME."),
    ] = None,
    name: Annotated[
        str | None,
        output_option(metavar="NAME", help="NAME of the default folder; without it the preset's."),
    ] = None,
    output_root: OutputRoot = None,
    checkpoint_every: Annotated[
        int | None, output_option(metavar="STEPS", help="Steps between checkpoints.")
    ] = None,
    dry_run: Annotated[
        bool,
        output_option("--dry-run", help="Print the plan with time and memory; train nothing."),
    ] = False,
    as_json: AsJson = False,
    rank_of: Annotated[
        Path | None,
        typer.Option(hidden=True, help="Be a rank of the run in DIR, which a launcher holds."),
    ] = None,
) -> None:
    """Train a preset, or go on with a run; one of --preset and --resume is required.

    Example: egtrain train --preset quickstart --seed 1 --set optimizer.lr=0.2

    Your own net and data: egtrain train --task flowers.py --preset eg --batch-size 2048
    """
    # Imported here, like torch below, so that --help does not wait for it.
    from egtrain.config.files import config_file_of, load_config, load_run_config

    file = task_file(task, data)
    overrides = overrides_of(
        data,
        data_dir,
        offline,
        device,
        {
            "epochs": epochs,
            "steps": steps,
            "seed": seed,
            "precision": precision,
            "compile": compile_model,
            "deterministic": deterministic,
            "checkpoint.every": checkpoint_every,
            "init.file": None if init_from is None else str(init_from.expanduser().absolute()),
            "init.strict": init_strict,
        },
    )
    overrides += settings or []
    if (name is not None or output_root is not None) and (resume or output) is not None:
        raise UsageError(
            f"{'--output' if resume is None else '--resume'} names the run directory itself: leave "
            "out --name and --output-root"
        )
    before: bytes | None = None
    if rank_of is not None:
        directory = rank_of
        config = load_run_config(directory, task=file)
    elif resume is not None:
        if preset is not None or output is not None:
            raise UsageError(
                "--resume goes on with a run as it is: leave out --preset and --output"
            )
        directory = resume
        before = config_file_of(directory).read_bytes()
        config = resumed_config(directory, overrides, workers, batch_size, allow_changes, file)
    elif preset is not None:
        config = with_batch(load_config(preset, overrides, file), workers, batch_size)
        default = config.preset if file is None else f"{file.path.stem}-{config.preset}"
        directory = output or runs_root(output_root) / named(default if name is None else name)
    else:
        raise UsageError(
            "name what to train: --preset NAME (see `egtrain presets`), or --resume DIR"
        )

    # Everything above needs no torch, so a wrong option is reported at once.
    with ending_at_interrupt():
        from egtrain import dry_run as plan_only
        from egtrain import session
        from egtrain.build import with_known_weights
        from egtrain.config.schema import config_to_yaml
        from egtrain.ranks import launch, torchrun
        from egtrain.run_directory import RunDirectory
        from egtrain.task_file import TaskFileError

    if before is None and rank_of is None:
        config = with_known_weights(config)
    if dry_run:
        plan_only.print_plan(config, directory, nproc, as_json)
        return
    if rank_of is not None and not torchrun.has_launcher():
        raise UsageError(f"--rank-of is for the processes of --nproc: use --resume {rank_of}")
    run_directory = RunDirectory(
        directory,
        goes_on_from=before,
        held_by_launcher=rank_of is not None,
        numbered=preset is not None and output is None,
    )
    if torchrun.started_by_torchrun():
        if nproc is not None:
            raise UsageError("torchrun has started the processes already: leave out --nproc")
    else:
        ranks = nproc if nproc is not None else launch.default_ranks(config.device, config.workers)
        launch.require_dividing(config.workers, ranks)
        if ranks > 1 or max_restarts:
            with run_directory:
                arguments = ["train", "--rank-of", str(run_directory.path)]
                arguments += ["--json"] if as_json else []
                arguments += [] if file is None else ["--task", str(file.path)]
                run_directory.write_config(config_to_yaml(config))
                code = launch.launch(ranks, arguments, max_restarts, run_directory.lock_file)
                if code in (UsageError.exit_code, DataError.exit_code, TaskFileError.exit_code):
                    run_directory.withdraw()
            raise typer.Exit(code)
    session.train_in(run_directory, config, as_json=as_json)


def named(name: str) -> str:
    """Return `NAME-TIME`.

    Raises:
        UsageError: the name cannot be that of a run.
    """
    from egtrain.config.schema import can_name_a_folder

    if not can_name_a_folder(name) or not name or name.startswith("."):
        shown = repr(name if len(name) <= 60 else f"{name[:60]}…")
        raise UsageError(
            "--name takes at most 200 printable characters without '/', and none that begin with "
            f"'.', not {shown}"
        )
    return f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def with_batch(config: "Config", workers: int | None, batch_size: int | None) -> "Config":
    """Return the configuration at another number of workers K or batch size B = K·b.

    K alone keeps b, B alone keeps b and sets K = B/b, both set b = B/K.

    Raises:
        UsageError: the numbers do not divide.
    """
    b = config.worker_batch_size
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}")
    if batch_size is not None and workers is None:
        if batch_size % b:
            low = max(batch_size // b, 1) * b
            raise UsageError(
                f"--batch-size {batch_size} is not a multiple of a worker's batch of {b}: use "
                f"{low} or {low + b}, or give --workers too"
            )
        workers = batch_size // b
    elif batch_size is not None and workers is not None:
        if batch_size % workers:
            low = max(batch_size // workers, 1) * workers
            raise UsageError(
                f"--batch-size {batch_size} does not divide by {workers} workers: use {low}"
            )
        b = batch_size // workers
    if workers is None:
        return config
    return config.model_copy(update={"workers": workers, "worker_batch_size": b})


def resumed_config(
    directory: Path,
    overrides: list[str],
    workers: int | None,
    batch_size: int | None,
    allow_changes: bool,
    task: "TaskFile | None" = None,
) -> "Config":
    """Return the configuration of a run directory, with changes where they are allowed.

    Raises:
        UsageError: there is no run, or settings differ and `allow_changes` was not given.
    """
    from egtrain.config.files import load_run_config
    from egtrain.config.schema import differences

    saved = load_run_config(directory)
    config = load_run_config(directory, overrides, task, allow_changes=True)
    config = with_batch(config, workers, batch_size)
    if config.init != saved.init:
        raise UsageError(
            "a run keeps the weights that it began with: leave out --init-from and --init-strict, "
            "or start a new run"
        )
    changes = differences(saved, config)
    if changes:
        for line in changes:
            typer.echo(f"changed: {line}", err=True)
        if not allow_changes:
            raise UsageError(
                "the settings differ from those of the run: leave them out, or add --allow-changes"
            )
    return config
