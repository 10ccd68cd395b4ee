"""Curvature and loss landscapes of a trained model, for any `torch.nn.Module` with a loss function
and batches.

`with frozen_loss.FrozenLoss(model, loss_function, batches) as loss:` is what the functions of the
other files measure.
"""
