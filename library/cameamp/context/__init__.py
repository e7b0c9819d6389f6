"""C-Optim: what an optimizer knows of its own course, and the one factor of all its learning rates."""
