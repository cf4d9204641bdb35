"""What every room needs and none owns: whole files, the machine, memory use, quiet libraries."""
