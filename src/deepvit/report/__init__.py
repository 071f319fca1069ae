"""Tables and figures of runs, from their folders' JSON alone: `deepvit report RUNS...`."""
