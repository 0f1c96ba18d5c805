"""What a smaller cache costs: likelihood, divergence and retrieval, beside the bytes that the cache really takes."""

from kvpass.quality.measures import Score, continuation, table
from kvpass.quality.models import CacheBytes, HuggingFaceModel, HuggingFaceState, Scored, cache_bytes
from kvpass.quality.recall_model import train_recall_model
from kvpass.quality.retrieval import (
    ALPHABET,
    Alphabet,
    RecallBatch,
    Retrieval,
    planted_fact,
    recall,
    recall_task,
    retrieval_table,
)

__all__ = [
    "ALPHABET",
    "Alphabet",
    "CacheBytes",
    "HuggingFaceModel",
    "HuggingFaceState",
    "RecallBatch",
    "Retrieval",
    "Score",
    "Scored",
    "cache_bytes",
    "continuation",
    "planted_fact",
    "recall",
    "recall_task",
    "retrieval_table",
    "table",
    "train_recall_model",
]
