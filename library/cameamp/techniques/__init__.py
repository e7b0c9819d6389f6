"""One published technique a file, each a function of tensors.

All tensors are float32 stacks of shape (tensors, rows, columns): parameters of one shape side by side, each seen as a
matrix. A name ending in an underscore updates the state it is given in place, as torch's own names do; everything else
is returned. No technique knows how a state is stored or what comes before and after it.
"""
