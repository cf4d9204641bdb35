"""What several experiments use: how they are run, scheduled, kept and reported; and what a family of them shares."""
