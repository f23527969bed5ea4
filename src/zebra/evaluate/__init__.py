"""Evaluation: perplexity, retrieval, questions and tasks, and the selection of global layers by measurement."""
