"""What a user starts: one module for each command, and `cli`, Hydra's outermost layer."""
