"""One script for a machine with a GPU: does everything work there, how fast is it, where does the time go, what trains.

`python -m benchmarks.gpu --out FOLDER` runs the parts of `benchmarks.gpu.__main__.PARTS`, each in a process of its own,
and leaves results.json (written after every figure), summary.md, plots and a log in FOLDER. `--quick` runs the same
code at toy sizes, on a CPU where there is no GPU.
"""
