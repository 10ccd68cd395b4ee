"""The search for the best learning rates: the cells that the results of others ask for.

What a search runs is a function of the results so far and of nothing else. So an interrupted sweep
goes on where it was, and a finished one is read again without running anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from egtrain.config.schema import Config
from egtrain.sweep.cells import Folder, Status
from egtrain.sweep.plan import HIGHEST_FACTOR, LOWEST_FACTOR, Cell, Facts, Plan, make_cell
from egtrain.sweep.request import Preset, Request
from egtrain.sweep.results import Merit, rate_merits, read_cell


def next_factors(merits: Mapping[float, Merit]) -> tuple[float, ...]:
    """Return the factors of the learning rate to try next, given the merits of those tried.

    The grid grows at an end that is as good as the best, by a factor of two. If no run finished
    anywhere, it grows downwards, since runs diverge at large rates. Nothing is left to try if both
    ends are worse than the best, or at the bounds.
    """
    low, high, best = min(merits), max(merits), max(merits.values())
    nothing_finished = best.finished == 0
    further = []
    if merits[low] == best:
        further.append(low / 2)
    if merits[high] == best and not nothing_finished:
        further.append(high * 2)
    return tuple(factor for factor in further if LOWEST_FACTOR <= factor <= HIGHEST_FACTOR)


def continued(
    plan: Plan,
    request: Request,
    presets: Sequence[Preset],
    facts_of: Callable[[Config], Facts],
    folder: Folder,
) -> Plan:
    """Return the plan with all cells that the results in the folder ask for.

    Each preset, batch size and length of the extrapolation has a search of its own; where one of
    its cells is not finished or has failed, it waits. A plan without a search stays as it is.

    Raises:
        UsageError: another run is in a cell's place.
    """
    if not plan.searches_rates:
        return plan
    validation = plan.cells[0].config.data.validation
    names = [preset.name for preset in presets]
    lines: dict[tuple[str, int, float], list[Cell]] = {}
    for cell in plan.cells:
        lines.setdefault((cell.preset, cell.batch_size, cell.length_factor), []).append(cell)
    for (name, batch_size, length), cells in lines.items():
        preset = presets[names.index(name)]
        results = [read_cell(plan, cell, folder) for cell in cells]
        while all(result.status in (Status.done, Status.diverged) for result in results):
            more = [
                make_cell(request, preset, batch_size, number, rate, length, validation, facts_of)
                for rate in next_factors(rate_merits(plan, results))
                for number in range(request.seeds)
            ]
            if not more:
                break
            cells += more
            results += [read_cell(plan, cell, folder) for cell in more]

    def place(cell: Cell) -> tuple[int, int, int, float, float]:
        preset = names.index(cell.preset)
        number = cell.seed - presets[preset].config.seed
        return number, cell.batch_size, preset, cell.rate_factor, cell.length_factor

    # In an order that does not depend on which search went on first.
    every = sorted((cell for cells in lines.values() for cell in cells), key=place)
    digests = {cell.name: cell.digest for cell in every}
    return replace(plan, cells=tuple(every), identity={**plan.identity, "cells": digests})
