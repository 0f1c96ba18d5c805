"""Every error that kvpass raises on purpose, with what a user needs to act on it.

A message says what went wrong, where (layer, node or file) and what to do. The command line turns an error into its
`exit_status`: 2 when the request was wrong, 1 when a check failed.
"""

from __future__ import annotations


class KvpassError(Exception):
    """Base of all errors of kvpass.

    Args:
        what: one sentence: what was expected and what was found.
        where: the layer, node, tensor or file it concerns.
        fix: what the user can do about it.
    """

    exit_status = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  what to do: {fix}")
        super().__init__("\n".join(lines))


class RequestError(KvpassError):
    """The request itself is wrong: bad arguments, an unknown recipe key, missing calibration."""

    exit_status = 2


class PlanError(RequestError):
    """A recipe cannot be applied to this model; raised before any weight is read."""


class SourceError(RequestError):
    """The source is not a model that kvpass can read: a missing file, a corrupt shard, an encoder."""


class CaptureError(RequestError):
    """The model could not be captured as one graph, or what was captured is not a causal decoder.

    Attributes:
        layer: whose attention it is, where that can be told.
        node: in the graph, by name.
        source: `file.py:line function: code` of that node in the model's code.
        near: what came nearest to a match.
        captured: whether there is a graph, of which other layers can be asked.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "", near: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.near = near
        self.layer: int | None = None
        self.node = ""
        self.source = ""
        self.captured = False


class UnsupportedError(RequestError):
    """A pass or an exporter cannot express what was asked of it, with the reason."""


class CheckError(KvpassError):
    """A check failed: the numbers or the structure are not what the pass promised."""

    exit_status = 1


class OutputError(KvpassError):
    """An output could not be written (disk full, no permission); nothing was left behind."""

    exit_status = 1
