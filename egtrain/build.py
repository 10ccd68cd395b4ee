"""The only place where a configuration becomes objects; below it nothing sees a configuration."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from egtrain.config.extrapolations import DIRECTIONS
from egtrain.config.optimizers import Optimizer
from egtrain.config.schema import Config
from egtrain.config.tasks import LanguageSettings, TranslationSettings, UserSettings
from egtrain.data.finding import locate
from egtrain.data.images import ImageData, load_images
from egtrain.data.pairs import PairData, load_pairs
from egtrain.data.sets import OF_TASK
from egtrain.data.text import TextData, load_text
from egtrain.data.user import UserData, load_user_data
from egtrain.logs.environment import cores
from egtrain.models.imagenet_resnet import ImagenetResNet
from egtrain.models.loading import load_weights, without_wrappers
from egtrain.models.lstm import LSTMLanguageModel
from egtrain.models.resnet import ResNet
from egtrain.models.transformer import Transformer
from egtrain.models.vgg import VGG
from egtrain.optim.direction import Direction
from egtrain.optim.extrapolation import Extrapolation
from egtrain.optim.lamb import LAMB
from egtrain.optim.lars import LARS
from egtrain.optim.post_local import PostLocal
from egtrain.optim.randomness import seed_for
from egtrain.plan import build_plan, build_schedule, with_fitting_warmup
from egtrain.ranks.distributed import agreed, first_rank_first
from egtrain.run import DataSummary, Run
from egtrain.tasks import Task
from egtrain.tasks.contract import try_out, user_model
from egtrain.tasks.image import ImageTask
from egtrain.tasks.language import LanguageTask
from egtrain.tasks.loading import set_random_state
from egtrain.tasks.translation import TranslationTask
from egtrain.tasks.user import UserTask
from egtrain.weight_files import file_of, read_weights, sha256_of
from egtrain.workers import Ranks, Workers, carried_by

Data = ImageData | TextData | PairData | UserData


def load_data(config: Config, offline: bool = False) -> Data:
    """Load the data of a configuration; download nothing if it or `offline` forbids it.

    Raises:
        DataError: they are missing or damaged.
    """
    name, limit, task = config.data.name, config.data.train_samples, config.task
    folder = Path(config.data.dir) if config.data.dir else None
    offline = config.data.offline or offline
    if isinstance(task, LanguageSettings):
        tokens = None if limit is None else limit * task.bptt
        return load_text(
            name,
            data_dir=folder,
            offline=offline,
            max_vocabulary=task.max_vocabulary,
            train_tokens=tokens,
        )
    if isinstance(task, TranslationSettings):
        return load_pairs(
            name,
            data_dir=folder,
            offline=offline,
            source=task.source,
            target=task.target,
            subwords=task.subwords,
            max_length=task.max_length,
            train_samples=limit,
        )
    if isinstance(task, UserSettings):
        return load_user_data(
            task.code,
            task.settings,
            train_samples=limit,
            validation=config.data.validation,
        )
    return load_images(
        name,
        data_dir=folder,
        offline=offline,
        train_samples=limit,
        validation=config.data.validation,
        image_size=config.data.image_size,
    )


def locate_data(config: Config) -> str:
    """Return in a few words where the data are, or where they would come from."""
    if isinstance(config.task, UserSettings):
        return f"dataset() of {config.task.file}"
    folder = Path(config.data.dir) if config.data.dir else None
    data_set = OF_TASK[config.task.name].get(config.data.name)
    return locate(config.data.name, data_set, folder, config.data.offline)


def build_task(config: Config, data: Data, ranks: Ranks) -> Task:
    """Return the task of a configuration for a rank, with its data on the rank's device.

    Raises:
        UsageError: the batch is larger than the data, or a task file is not as it must be.
        TaskFileError: the code of a task file raised an exception.
    """
    device = ranks.device
    workers, share, seed, task = config.workers, config.worker_batch_size, config.seed, config.task
    if isinstance(task, LanguageSettings):
        assert isinstance(data, TextData)
        return LanguageTask(
            data, workers=workers, worker_batch_size=share, seed=seed, bptt=task.bptt, device=device
        )
    if isinstance(task, TranslationSettings):
        assert isinstance(data, PairData)
        return TranslationTask(
            data,
            workers=workers,
            worker_batch_size=share,
            seed=seed,
            label_smoothing=task.label_smoothing,
            device=device,
        )
    if isinstance(task, UserSettings):
        assert isinstance(data, UserData)
        if data.metrics is None:
            try_out(
                data,
                lambda: build_model(config, 0, device),
                seed=seed,
                worker_batch_size=share,
                loaders=config.data.loaders,
                precision=config.precision,
                device=device,
            )
        return UserTask(
            data,
            workers=workers,
            worker_batch_size=share,
            seed=seed,
            loaders=config.data.loaders,
            channels_last=config.channels_last,
            carried=carried_by(ranks, workers),
            sharing=ranks.count,
            device=device,
        )
    assert isinstance(data, ImageData)
    return ImageTask(
        data,
        workers=workers,
        worker_batch_size=share,
        seed=seed,
        augment=task.augment,
        channels_last=config.channels_last,
        device=device,
    )


def summary_of(data: Data) -> DataSummary:
    """Return what a checkpoint keeps of the data."""
    if isinstance(data, UserData):
        return DataSummary(data.digest)
    if isinstance(data, TextData):
        return DataSummary(data.digest, len(data.vocabulary), vocabulary=data.vocabulary)
    if isinstance(data, PairData):
        return DataSummary(data.digest, data.subwords.size, subwords=data.subwords.model)
    return DataSummary(data.digest, data.classes)


def build_model(config: Config, outputs: int, device: torch.device) -> nn.Module:
    """Return the model with the seed's initial weights, drawn on the CPU for every device.

    Raises:
        TaskFileError: the code of a task file raised an exception.
        UsageError: what its model() returns cannot be trained.
    """
    torch.manual_seed(seed_for(config.seed, "weights"))
    model: nn.Module
    if isinstance(config.task, UserSettings):
        set_random_state(seed_for(config.seed, "weights"))
        model = user_model(config.task.code, config.task.settings)
        return _placed(model, device, config.channels_last)
    shape = config.model
    match shape.name:
        case "lstm":
            model = LSTMLanguageModel(
                outputs,
                width=shape.width,
                layers=shape.layers,
                dropout=shape.dropout,
                columns=config.worker_batch_size,
            )
        case "transformer":
            model = Transformer(
                outputs,
                width=shape.width,
                heads=shape.heads,
                layers=shape.layers,
                feedforward=shape.feedforward,
                dropout=shape.dropout,
            )
        case "vgg":
            model = VGG(shape.depth, shape.width, outputs)
        case "resnet":
            model = ResNet(shape.depth, shape.width, outputs, shape.shortcut)
        case "imagenet-resnet":
            model = ImagenetResNet(shape.depth, shape.width, outputs)
        case "user":
            raise AssertionError("a task file's model was built above")
        case _:
            assert_never(shape)
    return _placed(model, device, config.channels_last and config.task.name == "image")


def with_known_weights(config: Config) -> Config:
    """Return the configuration with the very file of its initial weights, and what that holds.

    A run directory becomes its newest checkpoint, since the run may go on.

    Raises:
        DataError: the file is missing, or the run has no intact checkpoint.
        UsageError: the directory holds no run.
    """
    init = config.init
    if init.file is None:
        return config
    file = file_of(Path(init.file))
    known = {"file": str(file), "sha256": init.sha256 or sha256_of(file)}
    return config.model_copy(update={"init": init.model_copy(update=known)})


def load_initial_weights(config: Config, model: nn.Module, ranks: Ranks) -> tuple[str, ...]:
    """Give the model the configuration's initial weights; return what to tell the user; collective.

    Raises:
        DataError: the file is missing, damaged, or not the one of the configuration.
        UsageError: weights do not fit the model.
    """
    init = config.init
    if init.file is None:
        return ()
    path, sha256 = Path(init.file), agreed(init.sha256 or "", ranks) or None
    tensors = first_rank_first(ranks, lambda: read_weights(path, sha256))
    left_out = load_weights(
        model,
        without_wrappers(tensors, list(model.state_dict())),
        source=str(path),
        remedy="choose the model that they belong to"
        + (", or take what fits with --no-init-strict" if init.strict else ""),
        strict=init.strict,
    )
    return () if left_out is None else (f"not all weights are from {path.name}: {left_out}",)


def _placed(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    if channels_last:
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return model.to(device)


def build_optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Return the base optimizer; the loop sets its learning rate before every step."""
    match config.name:
        case "sgd":
            return torch.optim.SGD(
                model.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov and config.momentum > 0,
                weight_decay=config.weight_decay,
                foreach=True,
            )
        case "lars":
            return LARS(
                model.parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                trust_coefficient=config.trust_coefficient,
                adapt_norm_and_bias=config.adapt_norm_and_bias,
                decay_norm_and_bias=config.decay_norm_and_bias,
            )
        case "lamb":
            return LAMB(
                model.parameters(),
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                adapt_norm_and_bias=config.adapt_norm_and_bias,
                decay_norm_and_bias=config.decay_norm_and_bias,
            )
        case "adam" | "adamw":
            return (torch.optim.Adam if config.name == "adam" else torch.optim.AdamW)(
                model.parameters(),
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                foreach=True,
            )


def build_direction(config: Config) -> Direction | None:
    """Return the choice of ζ, or None for plain mini-batch training."""
    extrapolation = config.extrapolation
    name = DIRECTIONS[extrapolation.name]
    if name is None:
        return None
    file = import_module(f"egtrain.optim.directions.{extrapolation.name.replace('-', '_')}")
    direction: Direction = getattr(file, name)(**extrapolation.settings(config.workers))
    return direction


def worker_state_bytes(config: Config, outputs: int) -> int:
    """Return the bytes of a worker's past gradient, statistics, hidden state and local weights."""
    model = build_model(config, outputs, torch.device("cpu"))
    direction = build_direction(config)
    state = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if direction is not None:
        for tensors in direction.worker_state(list(model.parameters())).values():
            state += tensors
    if config.post_local.period is not None:
        # Weights and what the optimizer remembers of their gradients.
        optimizer = config.optimizer
        moments = (optimizer.momentum > 0) if optimizer.name in ("sgd", "lars") else 2
        state += list(model.parameters()) * (1 + moments)
    return sum(t.numel() * t.element_size() for t in state)


def build_run(config: Config, ranks: Ranks, data: Data | None = None, *, anew: bool = True) -> Run:
    """Return a run at step 0; its data are loaded unless they are given.

    `anew` is False if weights of a checkpoint follow, so that the initial ones are not needed.

    Raises:
        DataError: the data or the initial weights are missing or damaged.
        UsageError: the batch is larger than the data, the warm-up does not fit the run, the initial
            weights do not fit the model, or the ranks do not divide the workers.
    """
    config = config.model_copy(
        update={"precision": native_precision(config.precision, ranks.device)}
    )
    set_numerics(config, ranks)
    if data is None:
        data = first_rank_first(ranks, lambda: load_data(config))
    task = build_task(config, data, ranks)
    config = with_fitting_warmup(config, task.steps_per_epoch)
    plan = build_plan(config, task.steps_per_epoch)
    summary = summary_of(data)
    model = build_model(config, summary.outputs, ranks.device)
    notes = load_initial_weights(config, model, ranks) if anew else ()
    optimizer = build_optimizer(config.optimizer, model)
    workers = Workers(model, config.workers, ranks, config.deterministic)
    direction = build_direction(config)
    extrapolation = (
        Extrapolation(optimizer, direction, workers.carried, config.seed, workers.unshifted)
        if direction
        else None
    )
    post_local = None
    if plan.local_start is not None and config.post_local.period is not None:
        post_local = PostLocal(
            optimizer, workers.carried, start=plan.local_start, period=config.post_local.period
        )
    evaluate_every = max(1, round(config.evaluate_every * plan.steps_per_epoch))
    return Run(
        task=task,
        model=model,
        forward=torch.compile(model) if config.compile else model,  # type: ignore[arg-type]
        optimizer=optimizer,
        extrapolation=extrapolation,
        post_local=post_local,
        schedule=build_schedule(config, plan),
        workers=workers,
        steps=plan.steps,
        extrapolated_steps=plan.extrapolated_steps,
        new_samples=config.extrapolation.new_samples,
        clip_norm=config.optimizer.clip_norm,
        precision=config.precision,
        seed=config.seed,
        evaluate_every=evaluate_every,
        checkpoint_every=config.checkpoint.every or evaluate_every,
        data=summary,
        notes=(*data.notes, *notes),
        unread_steps=0 if ranks.device.type == "cpu" else 1,
    )


def native_precision(name: str, device: torch.device) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 where the device does not merely emulate it.

    On a CPU without AVX-512-bf16 or AMX, bf16 convolutions were measured to take ten times as long
    as fp32 ones.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return (
        "bf16"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else "fp32"
    )


def threads_of_a_rank() -> int:
    """Return the number of cores for each process of this run on this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def set_numerics(config: Config, ranks: Ranks) -> None:
    """Set the process's threads and its choice of kernels."""
    torch.set_num_threads(config.threads or (1 if config.deterministic else threads_of_a_rank()))
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    # fp32 means fp32 here: PyTorch's default on a GPU is TF32, with 10 instead of 23 bits.
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = (
        "ieee" if config.precision == "fp32" else "tf32"
    )
    if config.deterministic and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        # PyTorch promises equal matrix products for two values, and equal LSTMs only for this one.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        # The size in KiB of the 8 buffers above: PyTorch warns if cuBLASLt gets more than cuBLAS.
        os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")
