"""What the studies of training quality share: tasks, optimizers, variants, kept results, tables and pictures."""
