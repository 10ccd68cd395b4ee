"""Every base optimizer works with every direction in every loop, or is refused as its page says."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_two_ranks, process_group
from support_table import (
    DIRECTIONS,
    FSDP2,
    IN_ONE_PROCESS,
    IN_TWO_PROCESSES,
    LOOPS,
    OPTIMIZERS,
    REFUSED,
    Loop,
    message_of,
    page,
)
from torch import Tensor, nn

pytestmark = pytest.mark.timeout(180)
PAGE = Path(__file__).parents[1] / "docs" / "support.md"
PAIRS = list(itertools.product(OPTIMIZERS, DIRECTIONS))
Outcomes = dict[tuple[str, str], Tensor | str]


def weights(network: nn.Module) -> Tensor:
    """Return the weights in one vector, whole ones of sharded ones."""
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in network.parameters()]
    return torch.cat([w.detach().flatten() for w in whole])


def outcomes(run: Any) -> Outcomes:
    """Return for each optimizer and direction the weights, or the message."""
    found: Outcomes = {}
    for pair in PAIRS:
        try:
            found[pair] = weights(run(*pair))
        except (ValueError, RuntimeError) as error:
            found[pair] = str(error)
    return found


outcomes_here = functools.cache(outcomes)


def outcomes_on_ranks() -> dict[str, Outcomes]:
    with process_group():
        return {loop.title: outcomes(loop.run) for loop in IN_TWO_PROCESSES}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcomes]]:
    return on_two_ranks(outcomes_on_ranks, tmp_path_factory.mktemp("support"))


def check(loop: Loop, found: Outcomes) -> None:
    """Hold what was found to the table, and to the loop that comes to the same weights."""
    wrong = []
    others = None if loop.same_as is None else outcomes_here(loop.same_as)
    for pair in PAIRS:
        outcome, message = found[pair], message_of(*pair, loop.title)
        if isinstance(outcome, str):
            if message is None or message not in outcome:
                wrong.append(f"{pair}: {outcome}")
        elif message is not None:
            wrong.append(f"{pair}: works, but should not: {message}")
        elif not outcome.isfinite().all():
            wrong.append(f"{pair}: is not finite")
        elif others is not None and DIRECTIONS[pair[1]].gradients == 1:
            other = others[pair]
            # Muon computes in bfloat16, of shards in another order.
            close = 1e-2 if pair[0] == "Muon" and loop.title == FSDP2 else 1e-10
            if isinstance(other, str) or not torch.allclose(outcome, other, rtol=0, atol=close):
                wrong.append(f"{pair}: is not the same run")
    assert not wrong, "\n".join([loop.title, *wrong])


@pytest.mark.parametrize("loop", IN_ONE_PROCESS, ids=lambda loop: loop.title)
def test_the_table_holds_in_one_process(loop: Loop) -> None:
    check(loop, outcomes_here(loop.run))


@pytest.mark.parametrize("loop", IN_TWO_PROCESSES, ids=lambda loop: loop.title)
def test_the_table_holds_in_two_processes(loop: Loop, on_ranks: list[dict[str, Outcomes]]) -> None:
    for found in on_ranks:
        check(loop, found[loop.title])


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "make it anew: python tests/support_table.py > docs/support.md"
    )


def test_each_message_is_that_of_some_combination() -> None:
    said = {message_of(*pair, loop.title) for pair in PAIRS for loop in LOOPS}
    assert {refused.message for refused in REFUSED} <= said
