"""What must hold of every decoder, measured: used by the tests, and by the table of families in the docs.

Each property gives a `Cell`: the largest error relative to the spread of the logits, or the reason of a refusal.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kvpass
from kvpass.errors import PlanError, UnsupportedError
from kvpass.ir.check import compare
from kvpass.ir.execute import evaluate
from kvpass.ir.fixpoint import logits_of
from kvpass.ir.ops import attention_reference
from kvpass.ir.program import ATTENTION, Program, output_node, placeholder
from kvpass.passes import GroupHeads, PrunePyramid, SplitProjections
from kvpass.runtime.selective import SelectiveState
from kvpass.runtime.state import State
from kvpass.runtime.transformed import Transformed

TOLERANCE = 1e-5
PROPERTIES = {
    "captured": "every attention site found; identity recipe bit-identical to the captured graph; original's logits",
    "decode": "prefill + decode = forward",
    "ragged": "rows of different lengths in one batch = the rows alone",
    "split": "SplitProjections",
    "grouped": "GroupHeads to half the KV heads: symmetries hold, prefill + decode = forward",
    "pruned": "PrunePyramid behind the first layer, ragged: prefill + decode = forward with what was dropped masked",
    "saved": "save and load, bit-identical",
    "checkpoint": "save_pretrained, loaded by transformers",
}


@dataclass(frozen=True)
class Cell:
    """One measured property: an error, or why it was refused."""

    error: float = 0.0
    refused: str = ""

    @property
    def holds(self) -> bool:
        return not self.refused and self.error <= TOLERANCE


@dataclass
class Examination:
    """All cells of one decoder."""

    cells: dict[str, Cell] = field(default_factory=dict)
    seconds: float = 0.0


def examine(model: nn.Module, family: bool = True) -> Examination:
    """Measure every property of a decoder; `family` says that transformers knows it."""
    began = time.perf_counter()
    quiet()
    result = Examination()
    ids = tokens(model)
    with torch.no_grad():
        out = model(ids)
    original = getattr(out, "logits", out)
    slim = kvpass.transform(model, progress=False)
    result.cells["captured"] = _captured(slim, ids, original)
    result.cells["decode"] = Cell(decode_error(slim, ids))
    result.cells["ragged"] = Cell(ragged_error(slim, ids))
    result.cells["split"] = _split(slim, ids)
    grouped, result.cells["grouped"] = _grouped(slim, ids)
    result.cells["pruned"] = _pruned(slim, ids)
    result.cells["saved"] = _saved(grouped or slim, ids)
    if family:
        attention = model.config._attn_implementation
        result.cells["checkpoint"] = _checkpoint(grouped or slim, slim, ids, attention)
    result.seconds = time.perf_counter() - began
    return result


def quiet() -> None:
    """Keep other libraries' notes out of the way."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def tokens(model: nn.Module, batch: int = 3, length: int = 16) -> Tensor:
    """Random token ids, none of them special."""
    size = getattr(getattr(model, "config", None), "vocab_size", 60)
    return torch.randint(3, min(size, 60), (batch, length), generator=torch.Generator().manual_seed(1))


def graph_logits(program: Program, ids: Tensor) -> Tensor:
    """Logits of a program's graph, run node by node."""
    graph = program.forward
    with torch.no_grad():
        return logits_of(graph, {placeholder(graph, "input_ids"): ids}, program.read)


def stateless(slim: Transformed, ids: Tensor) -> Tensor:
    """The logits of a model's graph alone."""
    return graph_logits(slim.program, ids)


def forward(slim: Transformed, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return slim(ids)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def decode_error(slim: Transformed, ids: Tensor) -> float:
    """Prefill, a chunk of several tokens, then token by token, against forward."""
    expected = forward(slim, ids)
    first = ids.shape[1] // 2
    logits, state = slim.prefill(ids[:, :first], chunk=3)
    found = [logits.unsqueeze(1), slim.decode(ids[:, first : first + 3], state)]
    found += [slim.decode(ids[:, i : i + 1], state) for i in range(first + 3, ids.shape[1])]
    return compare(expected[:, first - 1 :], torch.cat(found, dim=1))


def ragged_run(slim: Transformed, ids: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
    """Logits [B, 5, V] of a right-padded batch's last tokens and of four more per row; the state before these."""
    logits, state = slim.prefill(ids[:, : int(lengths.max())], lengths)
    read = state.clone()
    steps = [logits]
    for step in range(4):
        following = ids[torch.arange(len(ids)), lengths + step].unsqueeze(1)
        steps.append(slim.decode(following, state)[:, 0])
    return torch.stack(steps, dim=1), read


def ragged_error(slim: Transformed, ids: Tensor) -> float:
    """A right-padded batch of different lengths, decoded on together, against each row alone."""
    lengths = torch.tensor([5, 9, 2])
    together, _ = ragged_run(slim, ids, lengths)
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        alone = forward(slim, ids[row : row + 1, : length + 4])[0, length - 1 :]
        worst = max(worst, compare(alone, together[row]))
    return worst


def _captured(slim: Transformed, ids: Tensor, original: Tensor) -> Cell:
    logits = forward(slim, ids)
    if not torch.equal(logits, graph_logits(slim.program, ids)):
        return Cell(refused="the identity recipe is not bit-identical to the captured graph")
    return Cell(compare(original, logits))


def _split(slim: Transformed, ids: Tensor) -> Cell:
    try:
        split = kvpass.transform(slim, [SplitProjections()], progress=False)
    except UnsupportedError as error:
        return Cell(refused=error.what)
    return Cell(compare(forward(slim, ids), forward(split, ids)))


def _grouped(slim: Transformed, ids: Tensor) -> tuple[Transformed | None, Cell]:
    counts = tuple(c.kv_heads // 2 if c.kv_heads % 2 == 0 else c.kv_heads for c in slim.plan)
    request = counts[0] if len(set(counts)) == 1 else counts
    try:
        grouped = kvpass.transform(slim, [GroupHeads(kv_heads=request)], progress=False)
    except UnsupportedError as error:
        return None, Cell(refused=error.what)
    reached = tuple(c.kv_heads for c in grouped.plan)
    assert reached == counts, f"asked for {counts} KV heads, got {reached}"
    _, state = grouped.prefill(ids)
    per_layer = [tuple(t.shape[1] for t in store) for store in state.stores.values()]
    assert per_layer == [(c, c) for c in counts], f"the caches hold {per_layer} KV heads"
    return grouped, Cell(max(decode_error(grouped, ids), ragged_error(grouped, ids)))


def _pruned(slim: Transformed, ids: Tensor) -> Cell:
    step = PrunePyramid(schedule="step", at=0, keep=0.5, max_recent=2, min_context=1, sinks=1)
    try:
        pruned = kvpass.transform(slim, [step], progress=False, verify="off")
    except (PlanError, UnsupportedError) as error:
        return Cell(refused=error.what)
    lengths = torch.tensor([12, 9, 2])
    together, state = ragged_run(pruned, ids, lengths)
    assert isinstance(state, SelectiveState)
    widest = max((o for o in pruned.plan.owners() if o > 0), key=lambda o: sum(state.fills[o]))  # windows hold fewer
    kept = state.positions(widest)
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        seen = torch.arange(length + 4) >= length
        seen[kept[row][0].long()] = True
        assert int(seen.sum()) < length + 4 or length == 2

        def masked(q: Tensor, k: Tensor, v: Tensor, *rest: Any, seen: Tensor = seen, **options: Any) -> Tensor:
            learned = (*rest, None, None)[:2]
            mask = seen.view(1, 1, 1, -1) if options["layer"] > 0 else None
            return attention_reference(q, k, v, *learned, mask, **options)

        graph, alone = slim.program.forward, ids[row : row + 1, : length + 4]
        with torch.no_grad():
            (found,) = evaluate(
                [output_node(graph)],
                {placeholder(graph, "input_ids"): alone},
                slim.program.read,
                lowered={ATTENTION: masked},
            )
        worst = max(worst, compare(found[0, length - 1 :], together[row]))
    return Cell(worst)


def _saved(slim: Transformed, ids: Tensor) -> Cell:
    with tempfile.TemporaryDirectory() as folder:
        slim.save(Path(folder) / "out")
        back = kvpass.load(Path(folder) / "out")
        if back.graph_text() != slim.graph_text() and slim.report.passes == []:
            return Cell(refused="the graph that was loaded is another one")
        same = torch.equal(forward(back, ids), forward(slim, ids))
        return Cell() if same else Cell(refused="logits differ after loading")


def _checkpoint(slim: Transformed, plain: Transformed, ids: Tensor, attention: str) -> Cell:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        refused = ""
        try:
            slim.save_pretrained(Path(folder) / "out")
        except UnsupportedError as error:
            refused = error.what
            slim = plain  # the rewrite has no place in a checkpoint of the family; the model itself must have one
            slim.save_pretrained(Path(folder) / "out")
        options = {"dtype": torch.float32, "attn_implementation": attention}
        back = AutoModelForCausalLM.from_pretrained(Path(folder) / "out", **options).eval()
        with torch.no_grad():
            return Cell(compare(forward(slim, ids), back(ids).logits), refused)
