"""The plan of a run, printed instead of training."""

import json
from pathlib import Path

from egtrain.build import (
    build_model,
    build_task,
    load_data,
    load_initial_weights,
    native_precision,
    summary_of,
)
from egtrain.checkpoint import CheckpointStore
from egtrain.config.schema import Config
from egtrain.cost import estimated_cost
from egtrain.errors import MissingExtra, NotDownloaded
from egtrain.header import facts_from_data, header_lines, run_facts
from egtrain.logs.environment import cores
from egtrain.plan import with_fitting_warmup
from egtrain.ranks import distributed, launch
from egtrain.run_directory import CHECKPOINTS
from egtrain.workers import Ranks


def print_plan(config: Config, directory: Path, nproc: int | None, as_json: bool) -> None:
    """Print what `train` would do and what it would take; train nothing.

    Raises:
        DataError: the data are damaged, or missing and not to be downloaded; or the initial weights
            are.
        UsageError: the batch is larger than the data, the warm-up does not fit the run, the initial
            weights do not fit the model, or the ranks do not divide the workers.
    """
    ranks = nproc if nproc is not None else launch.default_ranks(config.device, config.workers)
    launch.require_dividing(config.workers, ranks)
    device = distributed.pick_device(config.device)
    threads = config.threads or (1 if config.deterministic else max(1, cores() // ranks))
    config = config.model_copy(
        update={"precision": native_precision(config.precision, device), "threads": threads}
    )
    facts = run_facts(config, directory, device=device.type, ranks=ranks, threads=threads)
    try:
        data = load_data(config, offline=True)
    except (NotDownloaded, MissingExtra) as error:
        facts["missing"] = str(error)
        facts["notes"] = ["steps, rates, time and memory are known once the data are there"]
        if isinstance(error, MissingExtra):
            facts["notes"] = [str(error)]
    else:
        task = build_task(config, data, Ranks(device=device))
        fitting = with_fitting_warmup(config, task.steps_per_epoch)
        seconds, most = estimated_cost(fitting, data, Ranks(device=device), ranks)
        model = build_model(config, summary_of(data).outputs, device)
        begun = CheckpointStore(directory / CHECKPOINTS).steps()
        notes = () if begun else load_initial_weights(config, model, Ranks(device=device))
        facts |= facts_from_data(fitting, config, model, task, (*data.notes, *notes))
        facts |= {
            "step_seconds": seconds,
            "seconds": seconds * facts["steps"],
            "memory_mib": max(1, round(most / 2**20)),
        }
    if as_json:
        print(json.dumps({name: v for name, v in facts.items() if not name.endswith("_text")}))
    else:
        print("\n".join(header_lines(facts)))
