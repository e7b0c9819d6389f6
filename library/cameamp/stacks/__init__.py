"""Parameters of one shape side by side, so that a rule is a handful of operations and not a handful per parameter."""
