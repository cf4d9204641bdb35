"""Reading a model with its optimiser as a nested system: what is there, who trains it, in which order."""
