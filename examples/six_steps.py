"""The six steps of PyTorch's quantization-aware training; three of them are gone, and part of the model stays float.

python examples/six_steps.py [OUTPUT_FOLDER]
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo
from bitwright.quantization import convert, get_default_qconfig, prepare

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
model, digits = load_demo("cnn"), load_digits_split()
model.train()

# Step 1, changing the model (stubs, FloatFunctional, ReLU6 -> ReLU): nothing to do.
# Step 2, fusing operators by hand: nothing to do.

# Step 3: which parts are quantized, and how. None keeps a part float.
model.qconfig = get_default_qconfig()
model.head.qconfig = None

# Step 4: put fake quantizers in.
qat_model = prepare(model, digits.test_x[:2], verbose=True)

# Ordinary training.
optimizer = torch.optim.SGD(qat_model.parameters(), lr=1e-3, momentum=0.9)
for step in range(20):
    chosen = torch.arange(32 * step, 32 * step + 32)
    loss = F.cross_entropy(qat_model(digits.train_x[chosen]), digits.train_y[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# Step 5: the true int8 model. No model.eval() to forget, no backend to choose.
model_int8 = convert(qat_model)

# Step 6: run it. Inputs and outputs are float tensors.
y = model_int8(digits.test_x)
print(f"int8: {(y.argmax(1) == digits.test_y).float().mean():.1%} right")
print("written to", model_int8.save(output / "digits_int8.onnx"))
