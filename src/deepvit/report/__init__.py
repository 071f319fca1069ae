"""Tables and figures of runs, from their folders' JSON alone: `python -m deepvit.report RUNS...`."""
