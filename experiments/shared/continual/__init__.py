"""The paper's experiments on continual learning (NL Sec. 9): what levels learn from a stream, and what they forget."""
