"""A step of decoding, recorded once and replayed: what a GPU runs between two tokens without waiting for Python.

Kernels make a step the same at every length (`passes.lower_attention`): it depends on what there is room for, not on
how long sequences are. What still changes between steps (token ids, lengths, page tables, what is told of chosen
entries) is copied into tensors that stay in place; a recording holds for as long as the caches do. Off a GPU nothing
can be recorded, and the same step runs from the same tensors, which is how it is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpass.runtime.state import State

if TYPE_CHECKING:
    from kvpass.runtime.executor import Executor

WARM_UPS = 2  # runs before a recording, in which kernels are compiled and libraries take their workspaces
MOVING = ("starts", "fill_", "budget_", "recent_")  # what is copied besides page tables


@dataclass
class Recording:
    """One recorded step.

    Attributes:
        ids: [B, S] the token ids that it reads.
        moving: tensors that change between steps, by the name under which `decode` takes them.
        fixed: everything else that `decode` takes.
        graph: what is replayed; None off a GPU.
        logits: [B, S, V] where it leaves them.
    """

    ids: Tensor
    moving: dict[str, Tensor]
    fixed: dict[str, Any]
    graph: Any = None
    logits: Tensor | None = None


class DecodeGraphs:
    """Steps of one executor. A state keeps its recordings, one for each number of tokens per step: they hold on to its
    caches, and go with it.

    Attributes:
        recorded: how many recordings were made.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.recorded = 0

    def step(self, ids: Tensor, state: State) -> Tensor:
        """What `Executor.step` gives for token ids [B, S]: logits [B, S, V]. The state is not advanced."""
        arguments = self.executor.arguments(state, int(ids.shape[1]))
        moving, fixed = _parted(arguments, self.executor.tables_of(state))
        held = _identity(moving, fixed)
        shape = tuple(ids.shape)
        if shape not in state.recordings or state.recordings[shape][0] != held:
            state.recordings.pop(shape, None)  # its memory goes before that of the next is taken
            state.recordings[shape] = held, self._record(ids, moving, fixed)
        recording = state.recordings[shape][1]
        recording.ids.copy_(ids)
        for name, tensor in moving.items():
            recording.moving[name].copy_(tensor)
        if recording.graph is None:
            return self._run(recording)
        recording.graph.replay()
        assert recording.logits is not None
        return recording.logits.clone()

    def _run(self, recording: Recording) -> Tensor:
        return self.executor.call("decode", recording.ids, {**recording.moving, **recording.fixed})

    def _record(self, ids: Tensor, moving: dict[str, Tensor], fixed: dict[str, Any]) -> Recording:
        """Running a step writes its token where the step that is asked for writes it again."""
        self.recorded += 1
        recording = Recording(ids.clone(), {name: t.clone() for name, t in moving.items()}, fixed)
        if ids.device.type != "cuda":
            return recording
        side = torch.cuda.Stream(ids.device)
        side.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run(recording)
        torch.cuda.current_stream(ids.device).wait_stream(side)
        recording.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording.graph):
            recording.logits = self._run(recording)
        return recording


def _parted(arguments: dict[str, Any], tables: set[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a step is told: tensors to copy, and things that stay, with what grows with the text at its most."""
    moving: dict[str, Tensor] = {}
    fixed: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in tables:
            moving[name] = _widened(value)
        elif isinstance(value, Tensor) and name.startswith(MOVING):
            moving[name] = value
        elif name.startswith("ragged"):
            fixed[name] = True
        elif name.startswith("end_"):  # of chosen entries: all slots, of which empty ones say so
            fixed[name] = int(arguments[f"cache_{name.removeprefix('end_')}_positions"].shape[2])
        elif name == "end":
            fixed[name] = 0  # kernels do not look at it
        else:
            fixed[name] = value
    return moving, fixed


def _widened(table: Tensor) -> Tensor:
    """A table of pages [B, blocks] with room for more, at least 64, so that its shape seldom changes."""
    blocks = max(64, 1 << (int(table.shape[1]) - 1).bit_length())
    return torch.nn.functional.pad(table, (0, blocks - int(table.shape[1])), value=-1)


def _identity(moving: dict[str, Tensor], fixed: dict[str, Any]) -> object:
    """What a recording depends on: the places of what it reads and writes, the shapes of what is copied."""
    places = {n: (v.data_ptr(), tuple(v.shape)) if isinstance(v, Tensor) else v for n, v in fixed.items()}
    return places, {n: tuple(t.shape) for n, t in moving.items()}
