"""The IR verifier: what every program must satisfy, whatever pass it comes from."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from kvpass.errors import CheckError
from kvpass.ir.kv_format import KVFormat
from kvpass.ir.plan import CachePlan, LayerCache
from kvpass.ir.program import ATTENTION, PRUNE, Program, is_arithmetic, output_node, writes
from kvpass.ir.retention import Retention
from kvpass.ir.sites import SiteFinder

NAMESPACES = ("aten", "kvpass", "transformers")


def plan_of(program: Program) -> CachePlan:
    """The cache plan that a program's attention sites imply."""
    cuts = [n for n in program.forward.nodes if n.target is PRUNE]
    passed = {int(n.kwargs["layer"]): Retention.parse(str(n.kwargs["rule"])) for n in cuts}
    return CachePlan(
        tuple(
            LayerCache(
                layer=site.layer,
                heads=site.heads,
                kv_heads=site.kv_heads,
                key_dim=site.head_dim,
                value_dim=site.value_dim,
                dtype=site.kv_dtype,
                window=int(site.option("window")),
                sinks=int(site.option("sinks")),
                positions="tabulated mask" if site.optional("mask") is not None else "",
                kv_source=None if site.kv_source == site.layer else site.kv_source,
                format=KVFormat.parse(site.option("kv_format")),
                page=program.page_size,
                cache_positions=site.optional("sink_q") is not None,
                keeps=Retention.parse(site.option("keeps")) if site.option("keeps") else None,
                passes=passed.get(site.layer),
            )
            for site in SiteFinder(program)
        )
    )


def verify(program: Program, after: str) -> None:
    """Check a program's structure.

    Every node is used, defined before it is used, and calls an op of ATen, the dialect or integer arithmetic; every
    weight named exists with the shape declared; the graph runs on the meta device for several batches and lengths;
    logits keep their shape; attention sites are numbered in order and their heads divide.

    Raises:
        CheckError: naming the pass and the node.
    """
    for entry, graph in program.entries.items():
        seen: set[fx.Node] = set()
        for node in graph.nodes:
            missing = [n for n in node.all_input_nodes if n not in seen]
            if missing:
                raise _broken(after, entry, node, f"reads {missing[0].name}, which comes later or elsewhere")
            seen.add(node)
            if node.op == "call_function":
                namespace = getattr(node.target, "namespace", None)
                if not (namespace in NAMESPACES or is_arithmetic(node.target)):
                    raise _broken(after, entry, node, f"calls {node.target}, which is no op of the program")
                if not node.users and not writes(node):
                    raise _broken(after, entry, node, "is computed for nothing")
                if writes(node) and namespace != "kvpass":
                    raise _broken(after, entry, node, f"writes in place ({node.target})")
            elif node.op == "get_attr":
                if str(node.target) not in program.weights:
                    raise _broken(after, entry, node, f"names the weight {node.target}, which does not exist")
            elif node.op not in ("placeholder", "output"):
                raise _broken(after, entry, node, f"has the kind {node.op}")
    graph = program.forward
    for batch, length in ((2, 5), (1, 1), (3, 8)):
        try:
            shapes = program.shapes("forward", batch, length)
        except Exception as error:
            notes = "; ".join(getattr(error, "__notes__", []))
            raise CheckError(
                f"after {after}, the graph does not run on {batch} x {length} tokens: {error}", where=notes
            ) from error
        logits = shapes[output_node(graph)]
        wanted = (batch, length, program.facts.vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            raise CheckError(f"after {after}, the logits have shape {tuple(logits.shape)} instead of {wanted}")
    layers = [int(n.kwargs["layer"]) for n in graph.nodes if n.op == "call_function" and n.target is ATTENTION]
    if layers != list(range(program.facts.layers)):
        raise CheckError(f"after {after}, attention sites are numbered {layers} in a model of {program.facts.layers}")
    for site in SiteFinder(program):
        if site.heads % site.kv_heads:
            raise CheckError(f"after {after}, layer {site.layer} has {site.heads} heads over {site.kv_heads} KV heads")


def _broken(after: str, entry: str, node: fx.Node, what: str) -> CheckError:
    return CheckError(
        f"after {after}, the program is broken: {node.name} {what}",
        where=f"{entry}: {node.meta.get('source', node.name)}",
        fix="this is a defect of the pass; please report it with the recipe",
    )


def compare(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the spread of the first."""
    a, b = a.double(), b.double()
    spread = float(a.abs().max()) or 1.0
    return float((a - b).abs().max()) / spread


TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far exact and layout passes may move logits, relative to their spread, by compute dtype."""
