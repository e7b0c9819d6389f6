"""How a state tensor is kept between steps. No storage knows what it stores.

A storage turns one state of a stack of n same-shape parameters into named buffers, whose slices are what
`optimizer.state[p]` holds, and gives the rules a float32 (or bool) stack to work on:

    keys(name)                     the state keys that hold the state `name`
    allocate(name, shape, n, ...)  fresh buffers, {key: (n, ...)}
    read(name, buffers)            the stack, (n, rows, columns)
    write(name, buffers, stack)    keep what the rules made of it
"""
