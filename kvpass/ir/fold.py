"""Constant folding of weight expressions, lazily: an expression becomes a weight that is computed when it is read."""

from __future__ import annotations

from torch import Tensor, fx

from kvpass.ir.execute import ancestors, evaluate
from kvpass.ir.program import Program, Role, Weight, roles, sweep


def fold_weights(program: Program, *, everything: bool = True) -> Program:
    """A copy of the program in which every expression over weights alone is one named weight.

    Nothing is computed here: the new weights read their originals and run their expression each time they are read, so
    a checkpoint larger than memory converts tensor by tensor.

    Args:
        program: not changed.
        everything: False leaves the model's own expressions (a norm's 1 + weight, a transposed matrix) and folds those
            that a pass made, so that the parameters keep the names and shapes that the model's family gave them.
    """
    folded = program.copy()
    graph = folded.forward
    role = roles(graph)
    shapes = folded.shapes()
    chosen = []
    for node in graph.nodes:
        if node.op != "call_function" or role[node] != Role.WEIGHT:
            continue
        if all(role[u] == Role.WEIGHT for u in node.users if u.op != "output"):
            continue
        if everything or any("weight_name" in n.meta for n in ancestors([node])):
            chosen.append(node)
    originals = dict(folded.weights)
    inside = set(chosen)
    for node in reversed(list(graph.nodes)):  # what nothing but the chosen expressions reads
        if role[node] == Role.WEIGHT and node.users and all(u in inside for u in node.users):
            inside.add(node)
    taken = {str(n.target) for n in graph.nodes if n.op == "get_attr" and n not in inside}
    for node in chosen:
        name = _expression_name(node, taken)
        taken.add(name)
        folded.weights[name] = _lazy(originals, node, shapes[node])
        with graph.inserting_before(node):
            replacement = graph.get_attr(name)
        node.replace_all_uses_with(replacement, delete_user_cb=lambda user: role.get(user) != Role.WEIGHT)
    kept = folded.copy()  # expressions still reference their nodes in `folded`; the swept copy is what callers see
    sweep(kept.forward)
    used = kept.used_weights()
    kept.weights = {n: w for n, w in kept.weights.items() if n in used}
    return kept


def read_late(graph: fx.Graph) -> None:
    """Have every weight read right before each of its uses: `evaluate` then holds few weights at a time.

    A weight with several users (tied embeddings) is read for each; between the first and the last it is not held.
    """
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        for user in list(node.users):
            with graph.inserting_before(user):
                again = graph.get_attr(str(node.target))
            user.replace_input_with(node, again)
        graph.erase_node(node)


def _lazy(originals: dict[str, Weight], node: fx.Node, example: Tensor) -> Weight:
    def read() -> Tensor:
        def weight(name: str) -> Tensor:
            found = originals[name]
            tensor = found.read()
            return tensor if tensor.dtype == found.dtype else tensor.to(found.dtype)

        value: Tensor = evaluate([node], {}, weight)[0]
        return value.contiguous()

    constant = all(originals[str(n.target)].constant for n in ancestors([node]) if n.op == "get_attr")
    return Weight(tuple(example.shape), example.dtype, read, constant)


def _expression_name(node: fx.Node, taken: set[str]) -> str:
    """A stable name: the parameter it is mostly made of, and what makes it."""
    base = node.meta.get("weight_name")
    if base is None:
        sources = [str(n.target) for n in sorted(ancestors([node])) if n.op == "get_attr"]
        base = f"{sources[0]}.folded" if sources else f"constant.{node.name}"
    name, count = base, 1
    while name in taken:
        name, count = f"{base}.{count}", count + 1
    return str(name)
