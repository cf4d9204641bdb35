"""Experiments that train small language models on equal terms (`nestling eval quality|cost|stability`)."""
