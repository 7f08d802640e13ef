"""What ``benchmarks.quality`` is made of: the plan of runs, their data, how they are run and scored, and the report."""
