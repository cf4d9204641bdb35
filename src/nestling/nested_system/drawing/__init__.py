"""A nested system as a table, a picture and an interactive page."""
