"""How an answer is scored: by the benchmark that the question comes from."""

from evocomp.evaluation.tasks.scoring import score_answer

__all__ = ["score_answer"]
