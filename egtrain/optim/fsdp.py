"""Extrapolation of sharded parameters, as `fully_shard` (FSDP2) makes them.

All processes are one worker: the gradients of sharded parameters are the mean over the processes,
and each process shifts its own shards.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from egtrain.optim.direction import Direction
from egtrain.optim.sharded import is_sharded


def require_one_worker(
    parameters: Sequence[Tensor],
    direction: Direction,
    workers: int | range | None,
    models: Sequence[nn.Module],
) -> bool:
    """Return whether the parameters are sharded, and can be shifted so.

    Args:
        parameters: what the optimizer trains.
        direction: the choice of ζ.
        workers: what the user said; None if nothing.
        models: those whose parameters the optimizer trains, as far as they are known.

    Raises:
        ValueError: they cannot.
    """
    # So FSDP1 marks its pieces of parameters, also with use_orig_params=True.
    if any(hasattr(p, "_fsdp_flattened") for p in parameters):
        raise ValueError(
            "FullyShardedDataParallel gives the optimizer flattened pieces of parameters: wrap the "
            "model with torch.distributed.fsdp.fully_shard instead"
        )
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        return False
    if len(sharded) < len(parameters):
        raise ValueError(
            "the optimizer has sharded and whole parameters: make an optimizer and an "
            "Extrapolation for each kind"
        )
    if direction.worker_state([]):
        raise ValueError(
            f"{type(direction).__name__} needs each worker's own gradient, but that of sharded "
            "parameters is the mean over the processes: take OptimisticGradient, MSAM or noise"
        )
    if workers not in (None, 1):
        raise ValueError(
            f"the processes of sharded parameters are one worker: leave out workers={workers}"
        )
    if direction.gradients == 2 and workers is None:
        raise ValueError(
            "the second gradient of sharded parameters is the mean over the processes, not each "
            "one's own: pass workers=1 to take all processes as one worker"
        )
    drop_gathered_weights(models)
    known = {id(p) for model in models for p in model.parameters()}
    if any(id(p) not in known for p in sharded):
        raise ValueError(
            "weights that FSDP2 has gathered must be dropped when they are shifted: pass "
            "Extrapolation(..., model=model) with the model of these parameters"
        )
    return True


def drop_gathered_weights(models: Sequence[nn.Module]) -> None:
    """Let the next forward pass gather the weights as they are then.

    FSDP2 would take those that `unshard()`, or a forward pass without a backward, gathered before.
    """
    for model in models:
        for module in model.modules():
            if hasattr(module, "_get_fsdp_state"):
                _drop_gathered_weights(module)


def _drop_gathered_weights(module: Any) -> None:
    state = module._get_fsdp_state()
    # torch 2.10 has one group in a module.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    groups = [group for group in groups if group is not None]
    if any(group._all_gather_result is not None for group in groups):
        module.unshard()  # waits for what unshard(async_op=True) has begun
    for group in groups:
        group._to_sharded()  # module.reshard() does nothing after a forward pass that has failed
    # If the loop has set one, the next gathering would wait for it, and not for the shift.
    module.set_post_optim_event(None)
