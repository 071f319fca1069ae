"""One run on one rank: settings become objects, are trained or evaluated, and leave a run folder."""
