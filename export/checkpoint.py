"""`save_pretrained`: a plain Hugging Face checkpoint of a rewritten model, where the family can express it.

There is no code per family. The family's own model is built from the changed config, captured without weights, and
asked by execution where each head's rows stand in its projections (fused, interleaved, transposed or plain). The
rewritten weights are then written to those places, one tensor in memory at a time, and the result is captured again and
compared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kvpass.capture import capture, capture_config
from kvpass.errors import CheckError, KvpassError, UnsupportedError
from kvpass.export.program_folder import copy_companions
from kvpass.ir.check import compare
from kvpass.ir.execute import evaluate
from kvpass.ir.fold import fold_weights
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import Program, output_node, placeholder
from kvpass.ir.sites import AttentionSite, Refusal, SiteFinder
from kvpass.ir.sites import Path as OperandPath
from kvpass.ir.storage import StreamWriter
from kvpass.output import output_folder

if TYPE_CHECKING:
    from kvpass.manager import Report

CHECKED_BYTES = 1 << 30
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")

Maker = Callable[[], Tensor]


def save_pretrained(program: Program, folder: Path, *, overwrite: bool, report: Report | None = None) -> Path:
    """Write a checkpoint that transformers loads without kvpass.

    Raises:
        UnsupportedError: the model did not come from Hugging Face, or its config cannot say what the plan says.
        CheckError: what was written does not compute what the program computes.
    """
    config = target_config(program)
    target = _capture_target(config, program)
    source = fold_weights(program, everything=False)
    makers = assignments(source, target)
    dtype = program.facts.stored_dtype or program.facts.dtype
    names = sorted(makers)
    with output_folder(folder, overwrite=overwrite) as partial:
        config.save_pretrained(partial)
        writer = StreamWriter(partial)
        dtypes = {n: target.weights[n].dtype if target.weights[n].constant else dtype for n in names}
        writer.plan([(n, target.weights[n].shape, dtypes[n]) for n in names])
        for name in names:
            writer.write(name, makers[name]().to(dtypes[name]))
        writer.close()
        copy_companions(program.facts.folder, partial)
        if report is not None:
            text = json.dumps(report.to_dict(), indent=1, default=str)
            (partial / "kvpass_report.json").write_text(text, encoding="utf-8")
        if source.parameter_bytes() <= CHECKED_BYTES:
            _check_written(source, partial, dtype)
    return folder


def target_config(program: Program) -> Any:
    """The family's config for the program's plan.

    Raises:
        UnsupportedError: there is no config, KV heads differ between layers, or the family has no word for them.
    """
    from kvpass.ir.check import plan_of

    facts = program.facts
    if facts.config is None:
        raise UnsupportedError(
            f"{facts.name} did not come from Hugging Face, so there is no config to write",
            fix="use save() and kvpass.load()",
        )
    from transformers import AutoConfig

    values = copy.deepcopy(facts.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.architectures = values.get("architectures")
    config.dtype = facts.stored_dtype or facts.dtype
    counts = {layer.kv_heads for layer in plan_of(program)}
    if len(counts) > 1:
        raise UnsupportedError(
            f"layers have different numbers of KV heads ({sorted(counts)}), and a Hugging Face config has one number",
            where=f"{facts.family} config",
            fix="use the same number for all layers, or save() and kvpass.load()",
        )
    count = counts.pop()
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _KV_HEADS:
        if hasattr(text, name):
            setattr(text, name, count)
    return config


def _capture_target(config: Any, program: Program) -> Program:
    from kvpass.ir.check import plan_of

    facts = program.facts
    try:
        target = capture_config(config, facts.dtype)
    except KvpassError as error:
        raise UnsupportedError(
            f"{facts.family} cannot be built with the rewritten number of KV heads: {error.what}",
            fix="use save() and kvpass.load()",
        ) from error
    wanted, got = plan_of(program), plan_of(target)
    for mine, other in zip(SiteFinder(program), SiteFinder(target), strict=True):
        reason = _unsaid(wanted[mine.layer], got[mine.layer])
        if reason or mine.option("strict") != other.option("strict"):
            raise UnsupportedError(
                f"layer {mine.layer} {reason or 'does not read its own token'}, which a {facts.family} config cannot "
                "say",
                where=f"{facts.family} config",
                fix="use save() and kvpass.load(), which keep any plan",
            )
    if _shape(wanted) != _shape(got) and _shape(wanted) != _shape(_distinct(target)):
        raise UnsupportedError(
            f"the {facts.family} config cannot express {wanted.layers[0].kv_heads} KV heads "
            f"(its model then has {got.layers[0].kv_heads})",
            where=f"{facts.family} config",
            fix="use save() and kvpass.load(), which keep any plan",
        )
    return target


def _unsaid(wanted: LayerCache, got: LayerCache) -> str:
    """What a layer of the program does and the same layer of the family's model does not, besides its KV heads."""
    if wanted.kv_source != got.kv_source:
        return f"reads the keys and values of layer {wanted.kv_source}"
    if (wanted.window, wanted.sinks) != (got.window, got.sinks):
        return f"reads a window of {wanted.window} tokens and the first {wanted.sinks}"
    if wanted.cache_positions != got.cache_positions:
        return "counts positions in its cache"
    if wanted.format != got.format:
        return f"reads keys and values as {wanted.format} stores them"
    if wanted.keeps != got.keeps:
        return "drops entries of its cache by rank"
    if wanted.passes != got.passes:
        return "lets only some tokens of a prompt go on to the layers above"
    return ""


def _shape(plan: CachePlan) -> list[tuple[int, ...]]:
    return [(c.heads, c.kv_heads, c.key_dim, c.value_dim, c.window, c.sinks) for c in plan]


def _distinct(program: Program) -> CachePlan:
    """The plan with KV heads that are copies of one another counted once."""
    from kvpass.ir.check import plan_of

    plan = plan_of(program)
    for site in SiteFinder(program):
        try:
            heads = _distinct_rows(site.path("k")).shape[0]
        except Refusal:
            continue
        plan = plan.with_layer(site.layer, kv_heads=heads)
    return plan


def _distinct_rows(path: OperandPath) -> Tensor:
    rows = path.rows
    kept = [h for h in range(rows.shape[0]) if h == 0 or not torch.equal(rows[h], rows[h - 1])]
    return rows[kept]


def assignments(source: Program, target: Program) -> dict[str, Maker]:
    """For each parameter of the target, how to make it from the (folded) source.

    Raises:
        UnsupportedError: a parameter of the target has no counterpart.
    """
    makers: dict[str, Maker] = {}
    used = target.used_weights()
    parameters = [n for n, w in target.weights.items() if n in used and (not w.constant or w.persistent)]
    ours, theirs = SiteFinder(source), SiteFinder(target)
    for mine, other in zip(ours, theirs, strict=True):
        try:
            _assign_site(source, target, mine, other, makers)
        except Refusal as refusal:
            if _untouched(source, target, mine, other):
                continue
            raise UnsupportedError(
                f"layer {mine.layer}: the rewritten weights have no place in the family's checkpoint: {refusal}",
                where=f"layer {mine.layer}",
                fix="use save() and kvpass.load()",
            ) from refusal
    for name in parameters:
        if name in makers:
            continue
        if name not in source.weights and target.weights[name].persistent:
            makers[name] = _read(target, name)
            continue
        if name not in source.weights or source.weights[name].shape != target.weights[name].shape:
            raise UnsupportedError(
                f"the family's checkpoint wants {name} {target.weights[name].shape}, which the program does not have",
                where=name,
                fix="use save() and kvpass.load()",
            )
        makers[name] = _read(source, name)
    return makers


def _untouched(source: Program, target: Program, mine: AttentionSite, other: AttentionSite) -> bool:
    """Whether a site that cannot be read by execution (MLA) still has the family's own parameters."""
    return all(
        n in source.weights and source.weights[n].shape == target.weights[n].shape
        for n in target.used_weights()
        if not target.weights[n].constant and f".{other.layer}." in n
    ) and (mine.heads, mine.kv_heads) == (other.heads, other.kv_heads)


def _read(program: Program, name: str) -> Maker:
    return lambda: program.read(name)


def _assign_site(
    source: Program, target: Program, mine: AttentionSite, other: AttentionSite, makers: dict[str, Maker]
) -> None:
    pieces: dict[str, list[tuple[Tensor, Maker, bool]]] = {}
    for operand in ("q", "k", "v"):
        ours, theirs = mine.path(operand), other.path(operand)
        rows, places = _distinct_rows(ours), _distinct_rows(theirs)
        if operand == "q":
            rows, places = ours.rows, theirs.rows
        if rows.shape != places.shape:
            raise Refusal(f"{operand} has {rows.shape[0]} heads here and {places.shape[0]} there", theirs.target)
        projection, wanted = ours.projection, theirs.projection
        name = _parameter(wanted.weight)
        pieces.setdefault(name, []).append(
            (places.flatten(), _rows_of(source, projection.weight, projection.transposed, rows), wanted.transposed)
        )
        if (projection.bias is None) != (wanted.bias is None):
            raise Refusal(f"{operand} has a bias on one side only", theirs.target)
        if projection.bias is not None and wanted.bias is not None:
            bias_name = _parameter(wanted.bias)
            piece = (places.flatten(), _rows_of(source, projection.bias, False, rows), False)
            pieces.setdefault(bias_name, []).append(piece)
    for name, parts in pieces.items():
        makers[name] = _assemble(target, name, parts)
    ours_out, theirs_out = mine.output, other.output
    name = _parameter(theirs_out.projection.weight)
    makers[name] = _columns(source, target, name, ours_out, theirs_out)
    for option in ("sink_logits",):
        have, want = mine.optional(option), other.optional(option)
        if want is not None and have is not None:
            makers[_parameter(want)] = _folded(source, have)


def _parameter(node: fx.Node) -> str:
    if node.op != "get_attr":
        raise Refusal("the family computes a weight from its parameters", node)
    return str(node.target)


def _folded(program: Program, node: fx.Node) -> Maker:
    return lambda: program.fold(node)


def _rows_of(program: Program, node: fx.Node, transposed: bool, rows: Tensor) -> Maker:
    def make() -> Tensor:
        value = program.fold(node)
        return (value.T if transposed else value).index_select(0, rows.flatten())

    return make


def _assemble(target: Program, name: str, parts: list[tuple[Tensor, Maker, bool]]) -> Maker:
    shape, dtype = target.weights[name].shape, target.weights[name].dtype

    def make() -> Tensor:
        transposed = parts[0][2]
        whole = torch.zeros(shape[::-1] if transposed else shape, dtype=dtype)
        written = torch.zeros(whole.shape[0], dtype=torch.bool)
        for places, maker, _ in parts:
            whole[places] = maker().to(dtype)
            written[places] = True
        if not bool(written.all()):
            raise CheckError(f"{int((~written).sum())} rows of {name} belong to no head", where=name)
        return whole.T.contiguous() if transposed else whole

    return make


def _columns(source: Program, target: Program, name: str, ours: Any, theirs: Any) -> Maker:
    shape, dtype = target.weights[name].shape, target.weights[name].dtype

    def make() -> Tensor:
        value = source.fold(ours.projection.weight)
        value = value.T if ours.projection.transposed else value
        ordered = value.index_select(1, ours.columns.flatten()).to(dtype)
        whole = torch.zeros(shape[::-1] if theirs.projection.transposed else shape, dtype=dtype)
        whole[:, theirs.columns.flatten()] = ordered
        return whole.T.contiguous() if theirs.projection.transposed else whole

    return make


def _check_written(source: Program, folder: Path, dtype: torch.dtype) -> None:
    """Read the checkpoint back and compare logits with the program's, its weights rounded as they were stored."""
    back = capture(str(folder), source.facts.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.facts.vocab_size, (2, 16), generator=generator)

    def rounded(name: str) -> Tensor:
        value = source.read(name)
        if source.weights[name].constant or not value.is_floating_point():
            return value
        return value.to(dtype).to(source.weights[name].dtype)

    def logits(program: Program, read: Callable[[str], Tensor]) -> Tensor:
        graph = program.forward
        with torch.no_grad():
            value: Tensor = evaluate([output_node(graph)], {placeholder(graph, "input_ids"): ids}, read)[0]
        return value

    error = compare(logits(source, rounded), logits(back, back.read))
    allowed = {torch.float64: 1e-9, torch.float32: 1e-4}.get(source.facts.dtype, 5e-2)
    if not error <= allowed:
        raise CheckError(
            f"the checkpoint that was written computes other logits than the program (by {error:.1e} of their spread)",
            where=str(folder),
            fix="this is a defect; please report the family",
        )
