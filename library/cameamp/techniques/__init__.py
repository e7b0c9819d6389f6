"""The published techniques that a step combines: one file for each, written as functions of tensors.

Shapes: every tensor is a float32 stack (tensors, rows, columns) unless its docstring says otherwise. A stack holds
parameters of one shape, each seen as a matrix; a vector is a matrix of one column.

Units: the gradient is loss per weight. CAME divides this unit out, so the scaled gradient, the momentum, the residual
and the update are plain numbers of about 1. With CAME switched off the unit stays until AdaBelief divides it out. The
learning-rate mask turns a plain number into a change of the weights.

A function whose name ends in an underscore updates its first argument, or the states it is given, in place, as in
torch; all other results are returned. No technique knows how a state is stored, or what is computed before and after.
"""
