"""SupConLoss of pytorch-metric-learning without its matrices of all pairs.

python docs/examples/metric_learning.py
"""

import torch
from fusedacl.engine import MetricSupConLoss
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import MeanReducer

torch.manual_seed(0)
labels = torch.randint(50, (1024,))
inputs = torch.randn(50, 32)[labels] + torch.randn(1024, 32)
for loss_function in (MetricSupConLoss(reducer=MeanReducer()), SupConLoss(reducer=MeanReducer())):
    model = torch.nn.Linear(32, 16, bias=False)
    torch.nn.init.eye_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(20):
        loss = loss_function(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{type(loss_function).__name__}: {loss.item():.4f}")
