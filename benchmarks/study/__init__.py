"""What the studies of training quality share: tasks, optimizers, variants, finished runs, tables and pictures."""
