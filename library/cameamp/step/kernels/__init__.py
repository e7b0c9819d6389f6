"""The step as native code: the rules over a table of pointers, which gathers nothing and needs no stacks."""
