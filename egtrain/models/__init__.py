"""Networks: plain modules that know nothing of training."""
