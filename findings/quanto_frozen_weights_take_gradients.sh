#!/usr/bin/env bash
# Versions: optimum-quanto 0.2.7 with torch 2.13.0.
#
# Behaviour: after quantize() and freeze() the weight of a linear layer is a WeightQBytesTensor that still says
# requires_grad=True and dtype float32, and backward() gives it a gradient. torch's AdamW accepts it, builds full-size
# states for it and takes its steps, and the weight stays as it is: the codes that it consists of never change. Nothing
# warns. The bias of the same layer, an ordinary parameter, trains. One would expect "frozen" to mean that it needs no
# gradient, as in torchao (0.18 clears requires_grad when it quantizes) and bitsandbytes.
#
# What follows for users: an optimizer given model.parameters() of such a model spends memory on states and changes
# nothing. The optimizers of this project refuse such a parameter when they are built.
#
# Output seen:
#   requires_grad True, dtype torch.float32, gradient True, states ['exp_avg', 'exp_avg_sq', 'step']
#   weight changed False, bias changed True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 optimum-quanto==0.2.7 numpy setuptools
cat > "$folder/try.py" <<'PYTHON'
import torch
from optimum.quanto import freeze, qint8, quantize

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
quantize(model, weights=qint8)
freeze(model)
weight, bias = model[0].weight, model[0].bias
before = weight.dequantize().detach().clone(), bias.detach().clone()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
for _ in range(5):
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
has_gradient = weight.grad is not None and bool(weight.grad.abs().max() > 0)
print(
    f"requires_grad {weight.requires_grad}, dtype {weight.dtype}, gradient {has_gradient}, "
    f"states {sorted(optimizer.state[weight])}"
)
print(f"weight changed {not torch.equal(weight.dequantize(), before[0])}, bias changed {not torch.equal(bias, before[1])}")
PYTHON
output="$("$folder/venv/bin/python" "$folder/try.py" 2> /dev/null)"
echo "$output"
expected="requires_grad True, dtype torch.float32, gradient True, states ['exp_avg', 'exp_avg_sq', 'step']
weight changed False, bias changed True"
[ "$output" = "$expected" ] || { echo "changed since this was written"; exit 1; }
